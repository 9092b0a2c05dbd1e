"""``export.py``: from a run folder to a checked file, and to a hub."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from lost_loss import lose, write_own_loss
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline import export
from pipeline.errors import RecipeError
from pipeline.exporting import hub
from pipeline.exporting.formats import FORMATS
from pipeline.runs.card import CARD, read_card
from pipeline.runs.files import read_result
from shards.documents import DamagedFile

Train = Callable[..., None]


@pytest.fixture
def trained(run_train: Train, recipes: Path) -> Path:
    """The folder of a finished run."""
    run_train("ce.yaml", "epochs=1")
    return recipes / "runs" / "ce"


@pytest.mark.parametrize("name", ["onnx", "pt2"])
def test_a_run_is_exported_below_its_folder_and_the_check_is_told(
    trained: Path, capsys: pytest.CaptureFixture[str], name: str
):
    export.main(["runs/ce", f"format={name}", "images=8", "fold=yes"])
    told = capsys.readouterr().out.splitlines()
    assert told[-2].endswith("BatchNorms are folded")
    assert told[-1].startswith(f"runs/ce/export/student-{name}.{name}: largest difference of a logit ")
    assert told[-1].endswith("the same top-1 on 8 of 8 validation images")
    run = FORMATS[name].run(trained / "export" / f"student-{name}.{name}")
    assert run(torch.zeros(3, 3, 16, 16)).shape == (3, 20)
    assert [path.name for path in (trained / "export").iterdir()] == [f"student-{name}.{name}"]


def test_a_file_that_fails_the_check_is_not_kept_and_the_old_one_stays(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    out = tmp_path / "student.pt2"
    out.write_text("the file of yesterday")
    wrong = FORMATS["pt2"]._replace(run=lambda path: lambda images_BCHW: torch.zeros(len(images_BCHW), 20))
    monkeypatch.setitem(FORMATS, "pt2", wrong)
    with pytest.raises(RecipeError, match="other outputs than the student"):
        export.main(["runs/ce", "format=pt2", f"out={out}"])
    assert out.read_text() == "the file of yesterday"
    assert not list(tmp_path.glob(".export-*"))


def test_a_folder_for_a_hub_has_weights_card_and_what_was_measured(trained: Path):
    out = trained / "hub"
    out.mkdir()
    (out / "mine.txt").write_text("stays")
    export.main(["runs/ce", "format=hub", "out=runs/ce/hub", "images=4"])
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "README.md", "card.json", "mine.txt"}
    card = read_card(out / "model.safetensors")
    assert json.loads((out / "card.json").read_text()) == json.loads(card.metadata()[CARD])
    with safe_open(out / "model.safetensors", "pt") as ours, safe_open(trained / "student.safetensors", "pt") as theirs:
        assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in theirs.keys())  # noqa: SIM118
    text = (out / "README.md").read_text()
    front, body = text.split("---\n")[1:3]
    assert yaml.safe_load(front)["tags"] == ["image-classification", "knowledge-distillation", "ce"]
    result = read_result(trained)
    assert result is not None
    assert f"| top-1 | {result.last:.2f} % |" in body
    assert f"| parameters | {result.parameters:,} |" in body
    assert "It had no teacher." in body
    assert "16 × 16 pixels" in body


def test_a_network_of_timm_is_a_folder_that_timm_reads(run_train: Train, recipes: Path):
    run_train("ce.yaml", "epochs=1", "student.model=timm/mobilenetv3_small_050", "data.size=32")
    export.main(["runs/ce", "format=timm", "images=4", "out=runs/ce/timm"])
    model = timm.create_model(f"local-dir:{recipes / 'runs/ce/timm'}", pretrained=True)
    saved = load_file(recipes / "runs/ce/student.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.num_classes == 20


def test_a_network_of_ones_own_is_exported_from_its_best_weights_without_the_file_of_its_loss(
    run_train: Train, recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = write_own_loss(recipes, "exported_loss", monkeypatch)
    # One block that runs three times, and tied weights.
    network = {"model": {"path": "odd_networks:Looped", "stages": {"stage1": "stem"}}}
    recipe = yaml.safe_load(Path("ce.yaml").read_text()) | {"student": network, "losses": {"exported_loss:Own": {}}}
    Path("own.yaml").write_text(yaml.safe_dump(recipe | {"folder": "runs/own"}))
    run_train("own.yaml", "epochs=1")
    lose(file)
    best = load_file("runs/own/student_best.safetensors")
    for name in ("onnx", "pt2", "hub"):
        export.main(["runs/own", f"format={name}", "weights=best", "images=4"])
        assert "the same top-1 on 4 of 4 validation images" in capsys.readouterr().out
    written = load_file("runs/own/export/student_best-hub/model.safetensors")
    assert written.keys() == best.keys()
    assert all(torch.equal(written[key], best[key]) for key in best)


def test_weights_from_before_there_was_a_card_are_refused_in_one_line(trained: Path):
    weights = trained / "student.safetensors"
    save_file(load_file(weights), weights)
    (trained / "result.json").unlink()
    with pytest.raises(DamagedFile, match=r"student\.safetensors: has no card, which says its network") as raised:
        export.main(["runs/ce", "format=pt2"])
    assert "\n" not in str(raised.value)


def answer_post(path: str, content: bytes, endpoint: str, sent: dict[str, Any]) -> Any:
    """Return what a hub answers, and keep in ``sent`` what it was sent."""
    if path.endswith("/repos/create"):
        sent["created"].append(json.loads(content))
        return {"url": f"{endpoint}/me/small", "name": "me/small"}
    if "/preupload/" in path:
        names = [each["path"] for each in json.loads(content)["files"]]
        return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
    if "/commit/" in path:
        lines = [json.loads(line) for line in content.splitlines()]
        values = [line["value"] for line in lines if line["key"] == "file"]
        sent["files"] = {each["path"]: base64.b64decode(each["content"]) for each in values}
        return {"commitUrl": f"{endpoint}/me/small/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
    return {}


@pytest.fixture
def a_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A stand-in for the hub on this machine, and what it was sent."""
    sent: dict[str, Any] = {"created": [], "files": {}, "refuses": False}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status = 403 if sent["refuses"] else 200
            answer = answer_post(self.path, content, endpoint, sent)
            self.answer(status, answer)

        def do_GET(self) -> None:
            self.answer(200, {"id": "me/small", "modelId": "me/small", "sha": "1" * 40, "siblings": []})

        def answer(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "a-token")
    yield sent
    server.shutdown()
    server.server_close()


def test_a_push_sends_the_folder_and_only_when_asked(
    trained: Path, a_hub: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    export.main(["runs/ce", "format=hub", "images=4"])
    assert not a_hub["created"]
    export.main(["runs/ce", "format=hub", "images=4", "push=me/small", "private=yes"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("/me/small")
    (created,) = a_hub["created"]
    assert (created["name"], created["organization"], created["visibility"]) == ("small", "me", "private")
    folder = trained / "export" / "student-hub"
    assert a_hub["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_hub_that_refuses_is_one_line_and_the_files_stay(trained: Path, a_hub: dict[str, Any]):
    a_hub["refuses"] = True
    with pytest.raises(RecipeError, match=r"push: me/small: .*the files are in runs/ce/export/student-hub") as raised:
        export.main(["runs/ce", "format=hub", "images=4", "push=me/small"])
    assert "\n" not in str(raised.value)
    assert (trained / "export" / "student-hub" / hub.WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runs/ce"], r"give format=pt2\|onnx\|torchscript\|timm\|hub"),
        (["runs/ce", "format=onx"], "format: there is no 'onx'; known are pt2, onnx"),
        (["ce.yaml", "format=onnx"], "ce.yaml: expected the folder of a run, such as runs/demo/seed-0"),
        (
            ["runs/ce", "format=onnx", "push=me/small"],
            "push: only folders are uploaded; give format=hub or format=timm",
        ),
        (["runs/ce", "format=timm"], "cifar_resnet8 is none of timm's networks"),
        (["runs/ce", "format=hub", "fold=yes"], "leave out fold=yes"),
        (["runs/ce", "format=hub", "out=ce.yaml/student"], "out: ce.yaml cannot be written .*is not a folder"),
        (["runs/ce", "format=hub", "out=ce.yaml"], "out: ce.yaml is a file; give another path"),
        (["runs/ce", "format=onnx", "out=runs"], "out: runs is a folder; give another path"),
        (["runs/ce", "format=onnx", "images=0"], "images: Input should be greater than or equal to 1"),
        (["runs/ce", "format=onnx", "weights=ema"], "weights: there is no file runs/ce/student_ema.safetensors"),
    ],
)
def test_what_cannot_be_exported_is_one_line(run_train: Train, recipes: Path, words: list[str], told: str):
    run_train("ce.yaml", "epochs=1")
    with pytest.raises(RecipeError, match=told):
        export.main(words)


def test_a_library_that_is_missing_is_told_with_its_extra(trained: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"format=onnx needs onnx; pip install '\.\[export\]'"):
        export.main(["runs/ce", "format=onnx"])
