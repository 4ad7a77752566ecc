"""The loaders ours is measured against, on the same samples; a process of its own for each measurement.

Needs torch, Pillow, tokenizers, psutil, webdataset and, for Streaming, mosaicml-streaming and simplejpeg, but nothing
of fvlm, so that it runs in an environment of its own.

`webdataset` is what one writes first: tars read in a stream, pictures through Pillow, a padded batch. `streaming` reads
the same samples as MDS shards with MosaicML Streaming and its own picture type, and pads as well. `streaming_lean` is
the most that Streaming can be asked for: our decoder and no padding, which leaves the loader alone.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from benchmarks.dataloader_clock import print_figures, reading

BATCH = 32
"""Samples of a batch."""
STREAMING = ("streaming", "streaming_lean")
WRITE = "write_mds"


def webdataset_batches(folder: Path, num_workers: int) -> Iterator[dict[str, Any]]:
    """Batches of the tars in `folder/shards`, shuffled by shard and in a buffer of 1000 samples."""
    import webdataset

    tars = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    preprocess = Preprocess(folder)
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0)
        .shuffle(1000)
        .map(lambda parts: preprocess(*_from_tar(parts)))
    )
    yield from DataLoader(dataset, batch_size=BATCH, num_workers=num_workers, collate_fn=pad)


def _from_tar(parts: dict[str, Any]) -> tuple[dict, list[np.ndarray]]:
    names = sorted(name for name in parts if name.endswith(".jpg"))
    return json.loads(parts["json"]), [_pillow(parts[name]) for name in names]


def streaming_batches(folder: Path, num_workers: int, lean: bool) -> Iterator[dict[str, Any]]:
    """Batches of the MDS shards in `folder/mds` or, `lean`, `folder/mds_lean`."""
    from streaming import StreamingDataset

    preprocess = Preprocess(folder)

    class Samples(StreamingDataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = super().__getitem__(index)
            if lean:
                frames = _simplejpeg(sample["frames"], np.frombuffer(sample["sizes"], np.int64))
            else:
                frames = [np.asarray(picture.convert("RGB")) for picture in sample["frames"]]
            return preprocess(json.loads(sample["meta"]), frames)

    dataset = Samples(local=str(folder / ("mds_lean" if lean else "mds")), shuffle=True, batch_size=BATCH)
    yield from DataLoader(dataset, batch_size=BATCH, num_workers=num_workers, collate_fn=concatenate if lean else pad)


def write_mds(folder: Path) -> None:
    """The samples of `folder/shards` once more, as both kinds of MDS shards."""
    import webdataset
    from streaming import MDSWriter

    tars = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    columns = {
        "mds": {"meta": "str", "frames": "list[jpeg]"},
        "mds_lean": {"meta": "str", "frames": "bytes", "sizes": "bytes"},
    }
    for name, types in columns.items():
        with MDSWriter(out=str(folder / name), columns=types) as writer:
            for parts in webdataset.WebDataset(tars, shardshuffle=False):
                jpegs = [parts[name] for name in sorted(parts) if name.endswith(".jpg")]
                writer.write({"meta": parts["json"].decode(), **_mds_frames(jpegs, "sizes" in types)})


def _mds_frames(jpegs: Sequence[bytes], lean: bool) -> dict[str, Any]:
    if lean:
        return {"frames": b"".join(jpegs), "sizes": np.array([len(jpeg) for jpeg in jpegs], np.int64).tobytes()}
    return {"frames": [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]}  # JpegImageFiles, whose bytes are kept


def _pillow(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def _simplejpeg(jpegs: bytes, sizes: np.ndarray) -> list[np.ndarray]:
    import simplejpeg

    ends = np.cumsum(sizes)
    return [
        simplejpeg.decode_jpeg(jpegs[end - size : end], colorspace="RGB") for size, end in zip(sizes, ends, strict=True)
    ]


class Preprocess:
    """Metadata and pictures to tensors: frames uint8 [n, 3, H, W], tokens, labels (-100 where nothing is learnt)."""

    def __init__(self, folder: Path):
        self._encode: Callable = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
        self._system = json.loads((folder / "chat.json").read_text())["system"]

    def __call__(self, meta: dict[str, Any], pictures: Sequence[np.ndarray]) -> dict[str, Any]:
        prompt = f"<|im_start|>system\n{self._system}<|im_end|>\n<|im_start|>user\n{meta['user']}<|im_end|>\n"
        asked = self._encode(prompt + "<|im_start|>assistant\n").ids
        answer = self._encode(meta["assistant"] + "<|im_end|>\n").ids
        frames = torch.zeros((0, 3, 1, 1), dtype=torch.uint8)
        if pictures:
            frames = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        return {
            "frames": frames,
            "tokens": torch.tensor(asked + answer),
            "labels": torch.tensor([-100] * len(asked) + answer),
        }


def pad(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: frames uint8 [B, most frames, 3, H, W], tokens and labels [B, longest], and how many are real."""
    num_frames = torch.tensor([len(sample["frames"]) for sample in samples])
    shape = max((sample["frames"].shape[1:] for sample in samples), key=lambda shape: shape[-1])
    frames = torch.zeros((len(samples), int(num_frames.max()), *shape), dtype=torch.uint8)
    for row, sample in zip(frames, samples, strict=True):
        row[: len(sample["frames"])] = sample["frames"]
    padded = {
        name: torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], True, value)
        for name, value in (("tokens", 0), ("labels", -100))
    }
    return {"frames": frames, "num_frames": num_frames, **padded}


def concatenate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch without padding: frames uint8 [n, 3, H, W], tokens and labels [n] one after the other, and how many."""
    num_frames = torch.tensor([len(sample["frames"]) for sample in samples])
    frames = torch.cat([sample["frames"] for sample in samples if len(sample["frames"])] or [samples[0]["frames"]])
    text = {name: torch.cat([sample[name] for sample in samples]) for name in ("tokens", "labels")}
    return {"frames": frames, "num_frames": num_frames, **text}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the MDS shards, or read one stream and print its figures."""
    parser = reading(argparse.ArgumentParser(prog="python -m benchmarks.dataloader_rivals"))
    parser.add_argument("loader", choices=("webdataset", *STREAMING, WRITE))
    asked = parser.parse_args(arguments)
    if asked.loader == WRITE:
        write_mds(asked.folder)
        return 0

    def stream() -> Iterator[tuple[int, int]]:
        if asked.loader == "webdataset":
            batches = webdataset_batches(asked.folder, asked.workers)
        else:
            batches = streaming_batches(asked.folder, asked.workers, asked.loader == "streaming_lean")
        for batch in batches:
            yield len(batch["num_frames"]), int(batch["num_frames"].sum())

    package = "webdataset" if asked.loader == "webdataset" else "mosaicml-streaming"
    versions = {name: metadata.version(name) for name in ("torch", "pillow", package)}
    print_figures(stream, asked, versions=versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
