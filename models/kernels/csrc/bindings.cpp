// The Python face of the kernels. models/kernels/__init__.py has checked every argument; here pointers are taken and the GIL is let go.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <string>

#include "ops.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

template <class T, int... Shape>
using Array = nb::ndarray<T, nb::numpy, nb::shape<Shape...>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<nb::numpy, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const uint16_t, nb::numpy, nb::c_contig, nb::device::cpu>;
using Floats3 = Array<float, -1, -1, -1>;
using SketchValues = Array<int8_t, -1, -1, -1, 2>;
using SketchOffsets = Array<uint16_t, -1, -1, -1, 2>;
using ScreenValues = Array<uint8_t, -1, -1, -1, 2>;

static fanin::Block make_block(const std::string& connectivity, int width, const std::string& dtype, const nb::object& values,
                               Array<const float, -1, -1> bias, Array<const int32_t, -1, -1> labels, const nb::object& indices,
                               const nb::object& scales) {
  // Memory-mapped buffers are read-only: only train_step writes, and it asks for writable arrays itself.
  const auto data = nb::cast<nb::ndarray<nb::numpy, nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>>(values);
  fanin::Block block{};
  block.connectivity = connectivity == "dense"    ? fanin::Connectivity::dense
                       : connectivity == "shared" ? fanin::Connectivity::shared
                                                  : fanin::Connectivity::private_;
  if (dtype == "fp32")
    block.dtype = fanin::DType::fp32;
  else if (dtype == "fp16")
    block.dtype = fanin::DType::fp16;
  else if (dtype == "bf16")
    block.dtype = fanin::DType::bf16;
  else if (dtype == "int8")
    block.dtype = fanin::DType::int8;
  else
    throw nb::value_error(("the CPU kernels do not read " + dtype + " values").c_str());
  block.groups = (int64_t)data.shape(0);
  block.width = width;
  block.fan_in = (int)data.shape(1);
  block.group_size = (int)data.shape(2);
  block.values = const_cast<void*>(data.data());
  block.indices = indices.is_none() ? nullptr : nb::cast<Indices>(indices).data();
  block.bias = const_cast<float*>(bias.data());
  if (scales.is_none() == (block.dtype == fanin::DType::int8)) throw nb::value_error("int8 values, and no others, come with scales");
  block.scales = scales.is_none() ? nullptr : nb::cast<Array<const float, -1, -1>>(scales, false).data();
  block.labels = labels.data();
  return block;
}

static fanin::Screen make_screen(ScreenValues coarse, ScreenValues fine, Array<float, 6, -1> scale) {
  fanin::Screen screen{coarse.data(), fine.data(), {}};
  for (int i = 0; i < 6; ++i) screen.scale[i] = scale.data() + i * (int64_t)scale.shape(1);
  return screen;
}

static fanin::Sketch make_sketch(SketchValues values, SketchOffsets offsets, Array<uint16_t, -1, -1> rest, Array<float, 2, -1> scale) {
  return {2 * (int)values.shape(1), values.data(), offsets.data(), rest.data(), scale.data(), scale.data() + scale.shape(1)};
}

static void train_step(const fanin::Block& block, Array<const float, -1, -1> x, Array<const int64_t, -1> slots,
                       Array<const int32_t, -1> rows, Array<const float, -1> weights, const nb::object& values, Array<float, -1, -1> bias,
                       const std::vector<Floats3>& moments, const std::vector<Array<float, -1, -1>>& bias_moments,
                       Array<float, -1, -1> grad_x, Array<double, 1> loss, const std::string& loss_kind, double smoothing, const std::string& kind, double lr,
                       double beta1, double beta2, double eps, double weight_decay, int step, uint64_t key) {
  nb::cast<Values>(values);  // raises for a read-only array
  (void)bias;
  fanin::Step s{};
  s.loss = loss_kind == "bce" ? fanin::Loss::bce : fanin::Loss::squared_hinge;
  s.update = kind == "sgd" ? fanin::Update::sgd : kind == "momentum" ? fanin::Update::momentum : fanin::Update::adam;
  s.lr = (float)lr, s.beta1 = (float)beta1, s.beta2 = (float)beta2, s.eps = (float)eps, s.decay = (float)(lr * weight_decay);
  s.rest1 = (float)(1 - beta1), s.rest2 = (float)(1 - beta2);
  s.correction1 = (float)(1 / (1 - std::pow(beta1, step)));
  s.correction2 = (float)(1 / (1 - std::pow(beta2, step)));
  s.key = key;
  for (size_t i = 0; i < moments.size(); ++i) s.moment[i] = moments[i].data(), s.bias_moment[i] = bias_moments[i].data();
  s.slots = slots.data(), s.rows = rows.data(), s.weights = weights.data(), s.smoothing = (float)smoothing, s.positives = (int64_t)slots.shape(0);
  nb::gil_scoped_release release;
  *loss.data() = fanin::train_step(block, x.data(), (int)x.shape(0), s, grad_x.data());
}

NB_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of the head (C++); use them through models.kernels.";
  m.attr("interface") = 8;  // models/kernels/cpu.py compares it; goes up with every change of a signature below
  nb::class_<fanin::Block>(m, "Block").def(
      "__init__",
      [](fanin::Block* self, const std::string& connectivity, int width, const std::string& dtype, const nb::object& values,
         Array<const float, -1, -1> bias, Array<const int32_t, -1, -1> labels, const nb::object& indices, const nb::object& scales) {
        new (self) fanin::Block(make_block(connectivity, width, dtype, values, bias, labels, indices, scales));
      },
      "connectivity"_a, "width"_a, "dtype"_a, "values"_a, "bias"_a, "labels"_a, "indices"_a.none(), "scales"_a.none(),
      nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>(),
      "Pointers into a block's buffers, which it keeps alive.")
      .def("use_screen", [](fanin::Block& self, ScreenValues coarse, ScreenValues fine, Array<float, 6, -1> scale) {
        self.screen = make_screen(coarse, fine, scale);
      }, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
      .def("use_sketch", [](fanin::Block& self, SketchValues values, SketchOffsets offsets, Array<uint16_t, -1, -1> rest, Array<float, 2, -1> scale) {
        self.sketch = make_sketch(values, offsets, rest, scale);
      }, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>());
  m.def("screen", [](const fanin::Block& block, ScreenValues coarse, ScreenValues fine, Array<float, 6, -1> scale) {
    nb::gil_scoped_release release;
    return fanin::screen(block, make_screen(coarse, fine, scale));
  });
  m.def("sketch", [](const fanin::Block& block, SketchValues values, SketchOffsets offsets, Array<uint16_t, -1, -1> rest, Array<float, 2, -1> scale) {
    nb::gil_scoped_release release;
    return fanin::sketch(block, make_sketch(values, offsets, rest, scale));
  });
  m.def("sketched", &fanin::sketched);
  m.def("topk", [](const std::vector<fanin::Block>& blocks, Array<const float, -1, -1> x, int k, const std::vector<Array<const int64_t, -1>>& places,
                   const std::vector<bool>& excluded, Array<float, -1, -1> scores, Array<int32_t, -1, -1> labels) {
    std::vector<fanin::Subset> allowed;
    for (size_t b = 0; b < places.size(); ++b) allowed.push_back({places[b].data(), (int64_t)places[b].shape(0), excluded[b]});
    nb::gil_scoped_release release;
    fanin::topk(blocks, x.data(), (int)x.shape(0), k, allowed, scores.data(), labels.data());
  });
  m.def("scores", [](const fanin::Block& block, Array<const float, -1, -1> x, Floats3 out) {
    nb::gil_scoped_release release;
    fanin::scores(block, x.data(), (int)x.shape(0), out.data());
  });
  m.def("train_step", &train_step);
  m.def("grad_input", [](const fanin::Block& block, Array<const float, -1, -1, -1> grad, Array<float, -1, -1> grad_x) {
    nb::gil_scoped_release release;
    fanin::grad_input(block, grad.data(), (int)grad.shape(0), grad_x.data());
  });
  m.def("grad_values", [](const fanin::Block& block, Array<const float, -1, -1> x, Array<const float, -1, -1, -1> grad, Floats3 out) {
    nb::gil_scoped_release release;
    fanin::grad_values(block, x.data(), grad.data(), (int)x.shape(0), out.data());
  });
  m.def("levels", [] {
    nb::list names;
    for (const char* name : fanin::levels()) names.append(name);
    return names;
  });
  m.def("level", &fanin::level);
  m.def("use_level", [](const std::string& name) { return fanin::use_level(name.c_str()); });
  m.def("default_threads", &fanin::default_threads);
  m.def("threads", &fanin::threads);
  m.def("set_threads", &fanin::set_threads);
}
