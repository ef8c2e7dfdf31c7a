"""The server to compare with: FastAPI, a torch encoder and a dense output layer, as one would write it.

`benchmarks.serve` starts it:

    python -m benchmarks.dense_server bundle --encoder random-minilm

It takes the bundle's tokenizer and its numbers of labels and inputs; the dense weights are random, in fp32 or bf16, whichever
is faster here. POST /predict predicts each text by itself, one after the other, with all threads; POST /predict-batched those
that wait together.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from tokenizers import Tokenizer

from benchmarks.make_bundle import RANDOM_MINILM, load_encoder
from benchmarks.measure import count
from export.bundle import BundleError, open_bundle
from models.encoder import EncoderError
from models.kernels import cpu


class Model:
    """Texts → the k best of L labels: encoder, dense layer [L, D], torch.topk."""

    def __init__(self, bundle: Path, encoder: str, max_batch: int) -> None:
        opened = open_bundle(bundle, verify=False)
        manifest = opened.manifest
        self.encoder = load_encoder(encoder, manifest.max_length, seed=0)
        if self.encoder.width != manifest.width:
            raise EncoderError(f"{encoder} gives {self.encoder.width} numbers, the bundle's encoder {manifest.width}")
        self.tokenizer = Tokenizer.from_file(str(opened.tokenizer_file))
        embedded = self.encoder.transformer.config.vocab_size
        if self.tokenizer.get_vocab_size() > embedded:
            tokens = self.tokenizer.get_vocab_size()
            raise EncoderError(f"{encoder} embeds {embedded} tokens, the bundle's tokenizer has {tokens}")
        self.labels = manifest.labels
        weight = torch.randn(manifest.labels, manifest.width)
        both = [weight, weight.bfloat16()]
        self.weight, self.weight_for_batches = _fastest(both, 1), _fastest(both, max_batch)

    @torch.inference_mode()
    def predict(self, texts: list[str], k: int) -> tuple[list[list[int]], list[list[float]]]:
        """Labels and probabilities of the k best, per text."""
        encodings = self.tokenizer.encode_batch(texts)
        input_ids = torch.tensor([encoding.ids for encoding in encodings])
        attention_mask = torch.tensor([encoding.attention_mask for encoding in encodings])
        x = self.encoder(input_ids, attention_mask)
        weight = self.weight if len(texts) == 1 else self.weight_for_batches
        scores, labels = torch.nn.functional.linear(x.to(weight.dtype), weight).topk(k)
        return labels.tolist(), scores.float().sigmoid().tolist()


class PredictRequest(BaseModel):
    inputs: str
    top_k: int = 10


def create_app(model: Model, max_batch: int) -> FastAPI:
    one_at_a_time = asyncio.Lock()  # torch uses all threads for one text; two at once would hinder each other
    queue: asyncio.Queue[tuple[PredictRequest, asyncio.Future[list[dict[str, object]]]]] = asyncio.Queue()

    async def predict_batches() -> None:
        while True:
            batch = [await queue.get()]
            while len(batch) < max_batch and not queue.empty():
                batch.append(queue.get_nowait())
            k = max(request.top_k for request, _ in batch)
            labels, scores = await asyncio.to_thread(model.predict, [request.inputs for request, _ in batch], k)
            for (request, answer), row, row_scores in zip(batch, labels, scores, strict=True):
                answer.set_result(_rows(row[: request.top_k], row_scores[: request.top_k]))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(predict_batches())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/predict")
    async def predict(request: PredictRequest) -> dict[str, object]:
        async with one_at_a_time:
            labels, scores = await asyncio.to_thread(model.predict, [request.inputs], request.top_k)
        return {"labels": _rows(labels[0], scores[0])}

    @app.post("/predict-batched")
    async def predict_batched(request: PredictRequest) -> dict[str, object]:
        answer: asyncio.Future[list[dict[str, object]]] = asyncio.get_running_loop().create_future()
        queue.put_nowait((request, answer))
        return {"labels": await answer}

    return app


def _rows(labels: list[int], scores: list[float]) -> list[dict[str, object]]:
    return [{"id": f"L{label:09d}", "score": score} for label, score in zip(labels, scores, strict=True)]


@torch.inference_mode()
def _fastest(weights: list[torch.Tensor], batch: int) -> torch.Tensor:
    """The one that takes `batch` rows to their best labels in the least time, the better of two calls."""

    def taken_s(weight: torch.Tensor) -> float:
        x = torch.randn(batch, weight.shape[1]).to(weight.dtype)
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight).topk(10)
        return time.perf_counter() - began

    return min(weights, key=lambda weight: min(taken_s(weight) for _ in range(2)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dense_server", description=(__doc__ or "").partition(". ")[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--encoder", default=RANDOM_MINILM, help="as for benchmarks.make_bundle (default: %(default)s)")
    parser.add_argument("--max-batch", type=count, default=64, help="texts predicted together (default: %(default)s)")
    parser.add_argument("--threads", type=count, default=cpu.default_threads(), help="of torch (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        model = Model(given.bundle, given.encoder, given.max_batch)
    except (BundleError, EncoderError) as error:
        print(f"python -m benchmarks.dense_server: error: {error}", file=sys.stderr)
        sys.exit(2)
    model.predict(["warm up"] * given.max_batch, 10)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(model, given.max_batch), log_level="warning", access_log=False))
        dtypes = f"{model.weight.dtype}, batches {model.weight_for_batches.dtype}".replace("torch.", "")
        print(f"dense {dtypes}: {model.labels:,} labels at http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
        asyncio.run(server.serve([listener]))


if __name__ == "__main__":
    main()
