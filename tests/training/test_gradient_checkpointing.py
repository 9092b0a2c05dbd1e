"""With gradient checkpointing less is kept for the backward, and every number is the same to its last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import training_on_ranks
from gloo_ranks import Ranks
from resolved import run_of
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.batch import Outputs
from pipeline.config.recipe import load_recipe
from pipeline.errors import RecipeError
from pipeline.features.checkpointing import blocks, checkpoint_blocks
from pipeline.features.taps import FeatureTaps
from pipeline.models import create_model
from pipeline.models.stages import stages
from pipeline.training.journal import trace

Train = Callable[..., None]
NETWORKS = {
    "cifar_resnet20": {},
    "cifar_wrn_16_2": {},
    "cifar_shufflenet_v2": {},
    "resnet18": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "densenet121": {},
    "deeplabv3_resnet18": {"width": 0.125},
    "deeplabv3_mobilenet_v2": {"width": 0.25},
    "pspnet_resnet18": {"width": 0.125},
    "plain_fpn": {"width": 4},
    "timm/vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "drop_path_rate": 0.3, "proj_drop_rate": 0.1},
    "timm/convnext_atto": {"drop_path_rate": 0.3},
}


class Counted(nn.Module):
    """A block that notes its forwards, and whose buffer both decides what it computes and changes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        found = torch.tanh(self.linear(x) * (1.0 + self.seen)).square()
        self.seen += 1.0
        return found


def built(name: str, checkpointed: bool, wanted: tuple[str, ...] = ()) -> FeatureTaps:
    torch.manual_seed(0)
    model = create_model(name, 5, NETWORKS[name])
    auxiliary = {"aux"} & stages(model).keys()  # a head that only runs if it is tapped
    taps = FeatureTaps(model, stages(model), {*wanted, *auxiliary})
    if checkpointed:
        checkpoint_blocks(model)
    return taps.train()


def step(taps: FeatureTaps, passes: int = 1) -> Outputs:
    """Run forward and backward, and return the outputs; the losses read the features, too."""
    torch.manual_seed(1)
    for number in range(passes):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(number))
        outputs = taps(images)
        (outputs.logits_BK.square().sum() + sum(x.square().mean() for x in outputs.features.values())).backward()
    return outputs


def assert_equal(one: FeatureTaps, other: FeatureTaps) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    others = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        gradient = others[name].grad
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient), name


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_gradients_and_buffers_are_the_same_bits(name: str):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    plain, checkpointed = built(name, False), built(name, True)
    ours, theirs = step(plain, passes=2), step(checkpointed, passes=2)
    assert torch.equal(ours.logits_BK, theirs.logits_BK)
    assert_equal(plain, checkpointed)
    counts = [int(value) for key, value in checkpointed.model.named_buffers() if key.endswith("num_batches_tracked")]
    assert set(counts) <= {2}  # the statistics of BatchNorm took in each pass once


@pytest.mark.parametrize(
    ("name", "deep"), [("cifar_resnet20", "embedding"), ("resnet18", "embedding"), ("deeplabv3_resnet18", "aux")]
)
def test_taps_are_the_same_also_within_a_block(name: str, deep: str):
    wanted = ("stage1", "stage2.preact", "stage3", "last", deep)
    plain, checkpointed = built(name, False, wanted), built(name, True, wanted)
    ours, theirs = step(plain), step(checkpointed)
    assert ours.features.keys() == theirs.features.keys() == set(wanted)
    assert all(torch.equal(value, theirs.features[key]) for key, value in ours.features.items())
    assert_equal(plain, checkpointed)


@contextmanager
def kept_bytes(model: nn.Module, found: list[int]) -> Iterator[None]:
    """Note the bytes that are kept for the backward, each memory once: autograd's tensors, and the inputs of blocks."""
    memory: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        memory[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def keep_input(_block: nn.Module, args: tuple[Tensor]) -> None:
        keep(args[0])

    for block in blocks(model):
        block.register_forward_pre_hook(keep_input)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield
    found.append(sum(memory.values()))


def test_less_is_kept_for_the_backward():
    found: list[int] = []
    for checkpointed in (False, True):
        taps = built("cifar_resnet20", checkpointed)
        with kept_bytes(taps.model, found):
            taps(torch.randn(16, 3, 32, 32))
    assert found[1] < 0.5 * found[0]


def test_a_block_runs_again_only_in_the_backward_and_from_the_buffers_that_it_had():
    plain, again = (nn.Sequential(Counted(), Counted()) for _ in range(2))
    again.load_state_dict(plain.state_dict())
    checkpoint_blocks(again)
    x = torch.randn(3, 4)
    for model in (plain, again):
        for _ in range(2):
            model(x).sum().backward()
    with torch.no_grad():
        again(x), plain(x)
    assert [block.calls for block in plain] == [3, 3]
    assert [block.calls for block in again] == [5, 5]
    for ours, theirs in zip(plain.parameters(), again.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    assert [float(block.seen) for block in again] == [3.0, 3.0]


def test_blocks_are_the_outermost_modules_of_sequences():
    model = create_model("resnet18", 5)
    named = {module: path for path, module in model.named_modules()}
    assert [named[block] for block in blocks(model)] == [f"layer{n}.{m}" for n in (1, 2, 3, 4) for m in (0, 1)]


def test_a_run_has_the_same_bytes_and_may_change_it_on_the_way(run_train: Train, recipes: Path):
    run_train("ddkd.yaml", "compare=null", "epochs=1", "folder=runs/plain")
    words = ("ddkd.yaml", "compare=null", "epochs=1", "folder=runs/less")
    run_train(*words, "student.checkpoint=true", "stop.steps=2")
    run_train(*words, "stop.steps=3")
    run_train(*words, "student.checkpoint=true")
    ours, theirs = (load_file(f"runs/{name}/student.safetensors") for name in ("plain", "less"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert trace(Path("runs/plain/journal.jsonl")) == trace(Path("runs/less/journal.jsonl"))
    run = run_of("ddkd.yaml", ["compare=null"])
    assert run.identity == run_of("ddkd.yaml", ["compare=null", "student.checkpoint=true"]).identity


def test_frozen_blocks_and_a_precision_of_half_stay_the_same(run_train: Train, recipes: Path):
    words = ("ce.yaml", "epochs=1", 'student.freeze=["layer1.*", bn1]', "precision=bf16")
    for name in ("plain", "less"):
        run_train(*words, f"folder=runs/{name}", f"student.checkpoint={str(name == 'less').lower()}")
    ours, theirs = (load_file(f"runs/{name}/student.safetensors") for name in ("plain", "less"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_two_ranks_have_the_same_bytes(recipes: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(recipes)
    for name in ("plain", "less"):
        words = ["ce.yaml", "epochs=1", f"folder=runs/{name}", f"student.checkpoint={str(name == 'less').lower()}"]
        ranks(training_on_ranks.train, recipes, words, timeout=250)
    ours, theirs = (load_file(f"runs/{name}/student.safetensors") for name in ("plain", "less"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_what_cannot_be_is_one_line(run_train: Train, recipes: Path):
    with pytest.raises(RecipeError, match=r"student: compile and checkpoint cannot be combined; remove one of them$"):
        load_recipe("ce.yaml", ["student.compile=true", "student.checkpoint=true"])
    with pytest.raises(RecipeError, match=r"student\.checkpoint: .* has no sequence of blocks .*; remove checkpoint$"):
        run_train("ce.yaml", "student={model: alexnet, checkpoint: true}", "data.size=64")
    with pytest.raises(RecipeError, match="graph: true needs one GPU"):
        run_train("ce.yaml", "student.checkpoint=true", "graph=true")
