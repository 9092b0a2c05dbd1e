"""Bad files: manifests, sample tables, weights, and what lies in run folders, caches and preparations."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from grammar import CANARY, Trial, kind, spoil_bytes, spoil_document, training
from safetensors.torch import load_file, save
from small_networks import Small
from world import CACHE, DEMO, DEMO_WORDS, EVALUATE, TRAIN, VERIFY


class Hostile:
    """An object that leaves a canary where its pickle is loaded."""

    def __init__(self, gadget: str) -> None:
        self.gadget = gadget

    def __reduce__(self) -> tuple[Any, ...]:
        gadgets: dict[str, tuple[Any, ...]] = {
            "system": (os.system, (f"touch {CANARY}",)),
            "open": (open, (CANARY, "w")),
            "eval": (eval, (f"open({CANARY!r}, 'w')",)),
            "exec": (exec, (f"open({CANARY!r}, 'w').close()",)),
            "numpy": (np.save, (f"{CANARY}.npy", 0)),
        }
        return gadgets[self.gadget]


def hostile(random: Random) -> Hostile:
    return Hostile(random.choice(["system", "open", "eval", "exec"]))


# -- documents --------------------------------------------------------------------------------------------------------


def going_on(what: str) -> Trial:
    """Go on with the run that stopped halfway."""
    return training(what, "folder=half", "stop.steps=4", recipe="ddkd.yaml")


@kind("a manifest")
def manifest(random: Random, folder: Path) -> Trial:
    what = spoil_document(folder / "shards" / "manifest.json", random)
    words = ("ce.yaml", "stop.steps=1")
    return random.choice([Trial(what, VERIFY, ("shards", "--jobs", "1")), Trial(what, TRAIN, words), training(what)])


@kind("a result")
def result(random: Random, folder: Path) -> Trial:
    what = spoil_document(folder / "finished" / "result.json", random)
    return Trial(what, TRAIN, ("ce.yaml", "folder=finished", "journal.trackers=[]"))


@kind("an identity")
def identity(random: Random, folder: Path) -> Trial:
    what = spoil_document(folder / "half" / "identity.json", random)
    return going_on(what)


@kind("a checkpoint's state")
def state(random: Random, folder: Path) -> Trial:
    what = spoil_document(folder / "half" / "checkpoints" / "step-3" / "state.json", random)
    return going_on(what)


@kind("versions")
def versions(random: Random, folder: Path) -> Trial:
    what = spoil_document(folder / "half" / "versions.json", random)
    return going_on(what)


@kind("a run's own recipe")
def own_recipe(random: Random, folder: Path) -> Trial:
    what = spoil_bytes(folder / "finished" / "recipe.yaml", random)
    return Trial(what, EVALUATE, ("finished",))


@kind("a cache's header")
def header(random: Random, folder: Path) -> Trial:
    what = spoil_document(folder / "cache" / "cache.json", random)
    checks = Trial(what, CACHE, ("--verify", "cached.yaml"))
    return random.choice([training(what, recipe="cached.yaml"), checks, Trial(what, CACHE, ("cached.yaml", "block=8"))])


@kind("an unfinished preparation's journal")
def preparation(random: Random, folder: Path) -> Trial:
    path = folder / "unfinished" / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    part = folder / "line"
    part.write_text(lines[(number := random.randrange(len(lines)))])
    what = spoil_document(part, random)
    path.write_text("".join([*lines[:number], part.read_text().replace("\n", " ") + "\n", *lines[number + 1 :]]))
    part.unlink()
    return Trial(f"journal's line {number}: {what}", DEMO, ("unfinished", *DEMO_WORDS))


# -- sample tables ----------------------------------------------------------------------------------------------------

CELLS: dict[str, tuple[int, ...]] = {
    "label": (20, 25, -1, 2**31 - 1, -(2**31)),
    "shard": (2, 99, -1, 2**31 - 1),
    "id": (24, -1, 10**12, -(2**63), 0),
    "offset": (-1, 10**12, 2**63 - 1, 37_000, 0, 1),
    "size": (0, -1, 10**12, 1),
    "width": (0, -1, 2**31 - 1, 1),
    "height": (0, -1, 2**31 - 1, 1),
}


def _saved(array: np.ndarray, **more: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **more)
    return buffer.getvalue()


@kind("a number in a sample table", strict=True)
def cell(random: Random, folder: Path) -> Trial:
    path = folder / "shards" / "train.samples.npy"
    table = np.load(path)
    column = random.choice(list(CELLS))
    value, row = random.choice(CELLS[column]), random.randrange(1, len(table))
    table[column][row] = value
    path.write_bytes(_saved(table))
    return _reads_table(f"{column} {value} in row {row}", random)


@kind("a sample table that is none", strict=True)
def table(random: Random, folder: Path) -> Trial:
    path = folder / "shards" / "train.samples.npy"
    rows = np.load(path)
    archive = io.BytesIO()
    np.savez(archive, rows)
    contents = {
        "an archive": archive.getvalue(),
        "objects": _saved(np.array([hostile(random)], object), allow_pickle=True),
        "a pickle": pickle.dumps(hostile(random)),
        "another shape": _saved(rows.reshape(2, -1)),
        "a row less": _saved(rows[:-1]),
        "another type": _saved(rows["id"]),
        "other fields": _saved(np.zeros(len(rows), [("id", "<i8"), ("label", "<i4")])),
        "nothing": b"",
        "text": b"hello",
        "a header alone": path.read_bytes()[:128],
        "a header of nonsense": path.read_bytes().replace(b"'descr'", b"'wrong'"),
        "a huge header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{",
        "a shape of 10^15": path.read_bytes().replace(b"(24,)", b"(999999999999999,)"),
        "cut": path.read_bytes()[:-7],
    }
    what = random.choice(list(contents))
    path.write_bytes(contents[what])
    return _reads_table(f"the sample table is {what}", random)


def _reads_table(what: str, random: Random) -> Trial:
    memory = ("data.loader=memory", "data.crop=pad", "data.size=20", "stop.steps=3")
    verifies = Trial(what, VERIFY, ("shards", "--jobs", "1"))
    return random.choice(
        [verifies, training(what, "stop.steps=3"), training(what, "stop.steps=3"), training(what, *memory)]
    )


# -- weights ----------------------------------------------------------------------------------------------------------


def _zip(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _legacy(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _reads_weights(what: str, random: Random, file: str) -> Trial:
    teaches = training(what, f"teacher.weights={file}", recipe="ddkd.yaml")
    starts = training(what, f"student.start={{weights: {file}}}")
    return random.choice([teaches, starts, Trial(what, EVALUATE, ("ce.yaml", f"weights={file}"))])


@kind("weights that execute", strict=True)
def executing(random: Random, folder: Path) -> Trial:
    state: dict[str, Any] = dict(load_file(folder / "teacher.safetensors"))
    bad = hostile(random)
    wrapped = random.choice([bad, {**state, "args": bad}, {"state_dict": state, "args": bad}, [bad], {"x": [bad]}])
    writer = random.choice([_zip, _legacy, pickle.dumps])
    name = random.choice(["bad.pt", "bad.pth", "bad.safetensors", "bad.bin", "bad.ckpt"])
    (folder / name).write_bytes(writer(wrapped))
    return _reads_weights(f"{name} executes {bad.gadget} ({writer.__name__})", random, name)


@kind("weights of nonsense", strict=True)
def nonsense(random: Random, folder: Path) -> Trial:
    state = load_file(folder / "teacher.safetensors")
    name = random.choice([key for key, value in state.items() if value.is_floating_point()])
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "of int64": lambda x: x.long(),
        "of bool": lambda x: x > 0,
        "complex": lambda x: x.to(torch.complex64),
        "not a number": lambda x: torch.full_like(x, float("nan")),
        "infinite": lambda x: torch.full_like(x, float("inf")),
        "sparse": lambda x: x.to_sparse(),
        "without data": lambda x: x.to("meta"),
        "a negative variance": lambda x: x,
        "a row more": lambda x: torch.cat([x, x[:1]]),
        "a scalar": lambda x: x.flatten()[0],
        "empty": lambda x: x[:0],
    }
    what = random.choice(list(changes))
    name = "body.1.running_var" if what == "a negative variance" else name
    state[name] = changes[what](state[name]) if what != "a negative variance" else -state[name] - 1
    (folder / "bad.pt").write_bytes(_zip(state))
    return _reads_weights(f"{name} is {what}", random, "bad.pt")


@kind("weights in another wrapping")
def wrapping(random: Random, folder: Path) -> Trial:
    state = dict(load_file(folder / "teacher.safetensors"))
    prefix = random.choice(["module.", "_orig_mod.", "model.", "module._orig_mod.", "backbone.", "net."])
    renamed = {f"{prefix}{key}": value for key, value in state.items()}
    network = Small(20)
    wrapped = {
        "prefixed": renamed,
        "model_state_dict": {"model_state_dict": state},
        "state_dict, prefixed": {"state_dict": renamed},
        "with arguments": {"model": state, "args": Namespace(lr=0.1)},
        "EMA alone": {"model_ema": state},
        "raw and EMA": {"state_dict": state, "state_dict_ema": {key: value * 2 for key, value in state.items()}},
        "with thop's keys": {**state, "total_ops": torch.zeros(1), "body.total_params": torch.zeros(1)},
        "half the prefixes": {**renamed, **dict(list(state.items())[:2])},
        "nested": {"a": {"b": {"c": state}}},
        "the network itself": network,
        "a list": [state],
        "pairs": list(state.items()),
        "numbers as keys": {number: value for number, value in enumerate(state.values())},
        "nothing": {},
        "arrays": {key: value.numpy() for key, value in state.items()},
        "None": None,
    }
    what = random.choice(list(wrapped))
    name = random.choice(["bad.pt", "bad.pth.tar", "bad.ckpt", "bad.bin", "bad"])
    (folder / name).write_bytes(random.choice([_zip, _zip, _legacy])(wrapped[what]))
    return _reads_weights(f"{name}: {what} ({prefix})", random, name)


@kind("a weights file that is none", strict=True)
def no_weights(random: Random, folder: Path) -> Trial:
    whole = (folder / "teacher.safetensors").read_bytes()
    tensor = '{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [%s]}}'
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
        archive.writestr("../../escaped", b"x")
    contents = {
        "nothing": b"",
        "text": b"hello",
        "half": whole[: len(whole) // 2],
        "a header of 10^18": struct.pack("<Q", 10**18) + b"{}",
        "a header that is none": _safetensors(b"[" * 50_000),
        "no tensors": _safetensors(b"{}"),
        "overlapping": _safetensors((tensor % ("2", "0, 8")).encode(), bytes(4)),
        "a shape of 10^18": _safetensors((tensor % ("1000000000, 1000000000", "0, 4")).encode(), bytes(4)),
        "negative offsets": _safetensors((tensor % ("1", "-4, 0")).encode(), bytes(4)),
        "a zip": zipped.getvalue(),
        "a cut zip": _zip(load_file(folder / "teacher.safetensors"))[:-100],
        "an image": b"\xff\xd8\xff\xe0" + bytes(1000),
        "JSON": json.dumps({"a": 1}).encode(),
        "a pickle of a number": pickle.dumps(3),
        "metadata alone": save({}, {"best": "{}"}),
    }
    what = random.choice(list(contents))
    name = random.choice(["bad.safetensors", "bad.pt", "bad.pth", "bad.bin"])
    (folder / name).write_bytes(contents[what])
    return _reads_weights(f"{name} is {what}", random, name)


@kind("a place that is no file", strict=True)
def no_file(random: Random, folder: Path) -> Trial:
    (folder / "folder.pt").mkdir()
    os.mkfifo(folder / "pipe.pt")
    (folder / "loop.pt").symlink_to("loop.pt")
    (folder / "zero.pt").symlink_to("/dev/zero")
    (folder / "gone.pt").symlink_to("nowhere")
    name = random.choice(
        ["folder.pt", "loop.pt", "gone.pt", "missing.pt", "''", '"a\\0b.pt"', "a" * 300 + ".pt", "pipe.pt", "zero.pt"]
    )
    return _reads_weights(f"{name[:20]} is no file", random, name)


@kind("weights that are damaged")
def damaged_weights(random: Random, folder: Path) -> Trial:
    state = load_file(folder / "teacher.safetensors")
    name = random.choice(["teacher.safetensors", "bad.pt"])
    (folder / "bad.pt").write_bytes(_zip(state))
    return _reads_weights(spoil_bytes(folder / name, random), random, name)
