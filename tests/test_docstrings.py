"""The demo's corpus: sentences of docstrings under the public names of callables."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from examples.docstrings import build, collect
from examples.namespaces import Documented, in_source
from examples.prose import sentences


@pytest.fixture
def names(tmp_path: Path):
    """Writes source files and returns the docstrings found, by public name."""

    def find(**files: str) -> dict[str, str]:
        for name, source in files.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            if name.endswith("__"):
                path = tmp_path.joinpath(*name.strip("_").split("__"), "__init__.py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        with ThreadPoolExecutor(1) as pool:
            return {name: entry.doc for name, entry in in_source([tmp_path], pool).items()}

    return find


def function(name: str, doc: str) -> str:
    return f"def {name}():\n    {doc!r}\n"


class TestSentences:
    def test_numpydoc_keeps_summary_and_prose_only(self) -> None:
        doc = """
            Return a sorted copy of an array.

            The input is left as it is.  It may have
            any number of dimensions.

            Parameters
            ----------
            a : array_like
                Array to be sorted.

            Examples
            --------
            Sorting a list is easy.

            >>> sort([2, 1])
            [1, 2]

            Notes
            -----
            The algorithm is *stable*, e.g. equal items keep their order.
            """
        assert sentences(doc) == [
            "Return a sorted copy of an array.",
            "The input is left as it is.",
            "It may have any number of dimensions.",
            "The algorithm is stable, e.g. equal items keep their order.",
        ]

    def test_google_style_ends_a_section_where_the_indentation_ends(self) -> None:
        doc = """Open a file for reading.

        Args:
            path: Where the file lies on disk.

                A relative path starts here.

        Returns:
            An open file object.

        The caller closes the file.
        """
        assert sentences(doc) == ["Open a file for reading.", "The caller closes the file."]

    def test_rest_fields_directives_and_code_are_dropped(self) -> None:
        doc = """Send a message to the peer.

        Use it like this::

            send("This is not prose.")

        :param text: This describes a parameter only.
        :returns: This describes a result only.

        .. note:: This is a directive of the markup.
        """
        assert sentences(doc) == ["Send a message to the peer."]

    @pytest.mark.parametrize(
        ("written", "read"),
        [
            ("Convert with :func:`~numpy.linalg.svd` first.", "Convert with svd first."),
            ("Convert with :func:`svd <numpy.linalg.svd>` first.", "Convert with svd first."),
            ("Read ``None`` as `the default <https://example.org>`_ value [1]_.", "Read None as the default value."),
            ("See the [guide](https://example.org) of it.", None),
            ("The **whole** text is *one* line.", "The whole text is one line."),
            (r"Compute :math:`\frac{a}{b}` of both.", None),
            ("add(x, y, out=None) -> Tensor", None),
            ("+-----+-----+", None),
            ("Short.", None),
        ],
    )
    def test_markup_becomes_plain_text_or_the_sentence_goes(self, written: str, read: str | None) -> None:
        assert sentences(written) == ([read] if read else [])

    def test_only_a_summary_may_lack_its_full_stop(self) -> None:
        assert sentences("Dictionary that remembers order\n\nThis one was cut before its") == [
            "Dictionary that remembers order"
        ]

    def test_no_sentence_twice(self) -> None:
        assert sentences("Do it well now. Do it well now.") == ["Do it well now."]


class TestPublicNames:
    def test_a_private_module_is_seen_through_its_package(self, names) -> None:
        found = names(
            pkg__="",
            pkg__linalg__="from pkg.linalg._impl import *",
            **{"pkg__linalg___impl": "__all__ = ['svd']\n" + function("svd", "Decompose.") + function("helper", "Help.")},
        )
        assert found == {"pkg.linalg.svd": "Decompose."}

    def test_the_shortest_name_wins_and_stands_alone(self, names) -> None:
        found = names(
            pkg__="from .core import sort as sort",
            pkg__core__="from .sorting import sort",
            pkg__core__sorting=function("sort", "Sort."),
            other="from pkg import sort",
        )
        assert found == {"pkg.sort": "Sort."}

    def test_classes_methods_and_modules(self, names) -> None:
        source = (
            '"""A module."""\n'
            "class Queue:\n"
            "    'A queue.'\n"
            "    def get(self):\n        'Take one.'\n"
            "    def _peek(self):\n        'Look.'\n"
            "    @property\n    def size(self):\n        'How many.'\n"
            "async def run():\n    'Run it.'\n"
            "def _hidden():\n    'Hide.'\n"
            "def silent():\n    pass\n"
        )
        assert names(tools=source) == {
            "tools": "A module.",
            "tools.Queue": "A queue.",
            "tools.Queue.get": "Take one.",
            "tools.run": "Run it.",
        }

    def test_tests_vendored_copies_and_private_modules_are_left_out(self, names) -> None:
        body = function("work", "Work.")
        assert names(pkg__tests__test_x=body, pkg___vendor__lib=body, pkg___private=body, pkg__fine=body) == {
            "pkg.fine.work": "Work."
        }

    def test_nothing_is_executed(self, names, tmp_path: Path) -> None:
        names(evil=f"open({str(tmp_path / 'ran')!r}, 'w')\n" + function("work", "Work."))
        assert not (tmp_path / "ran").exists()

    def test_imports_in_a_circle_and_broken_files_do_no_harm(self, names) -> None:
        found = names(
            a="from b import *\nfrom b import lost",
            b="from a import *\nfrom a import lost\n" + function("kept", "Keep."),
            c="def (",
        )
        assert found == {"b.kept": "Keep."}


class TestBuild:
    def test_one_sentence_is_held_out_and_the_summary_stays(self) -> None:
        texts = ["Sort an array.", "It is stable.", "It is quick."]
        corpus = build([(Documented("np.sort", "np", ""), texts)])
        assert len(corpus.test) == 1
        assert corpus.test[0][1] == ["np", "np.sort"]
        assert "Sort an array." in [text for text, _ in corpus.train]
        assert sorted(text for text, _ in corpus.train + corpus.test) == sorted(texts)
        assert corpus.labels == {"np": "np", "np.sort": "Sort an array."}

    def test_a_shared_sentence_has_all_its_labels_and_is_never_held_out(self) -> None:
        both = "It works in place."
        entries = [(Documented(f"m.f{i}", "m", ""), [f"Summary number {i}.", both, f"Detail number {i}."]) for i in range(2)]
        corpus = build(entries)
        assert (both, ["m", "m.f0", "m.f1"]) in corpus.train
        assert len(corpus.test) == 2

    def test_a_sentence_of_many_callables_goes_and_so_do_labels_without_text(self) -> None:
        entries = [(Documented(f"m.f{i}", "m", ""), ["Runs the forward pass."]) for i in range(6)]
        corpus = build([*entries, (Documented("m.g", "m", ""), ["Runs backwards."])])
        assert corpus.train == [("Runs backwards.", ["m", "m.g"])]
        assert list(corpus.labels) == ["m", "m.g"]

    def test_files_are_what_training_reads(self, tmp_path: Path) -> None:
        build([(Documented("np.sort", "np", ""), ["Sort an array.", "It is stable.", "Größe zählt nicht."])]).write(tmp_path)
        rows = {path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in tmp_path.iterdir()}
        assert set(rows) == {"train", "test", "labels"}
        assert rows["labels"] == [{"id": "np", "name": "np"}, {"id": "np.sort", "name": "Sort an array."}]
        assert all(row["labels"] == ["np", "np.sort"] for row in rows["train"] + rows["test"])


@pytest.mark.slow
def test_this_machines_packages_make_a_large_clean_corpus() -> None:
    corpus = collect()
    assert len(corpus.labels) >= 15_000
    known = {
        "json.loads",
        "numpy.linalg.svd",
        "numpy.sort",
        "math.sqrt",
        "str.split",
        "os.path.join",
        "torch.Tensor.numpy",
        "json",
    }
    assert known <= set(corpus.labels)
    assert not [label for label in corpus.labels if any(part.startswith("_") for part in label.split("."))]
    train, test = ([text for text, _ in split] for split in (corpus.train, corpus.test))
    assert len(set(train)) == len(train)
    assert len(test) >= 3_000
    assert not set(train) & set(test)
    assert {label for _, labels in corpus.test for label in labels} <= set(corpus.labels)
    assert {label for _, labels in corpus.train for label in labels} == set(corpus.labels)
