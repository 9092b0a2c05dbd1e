"""Bad recipes and bad words."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import yaml
from grammar import CANARY, Trial, kind, reading_recipe, short, spoil, training
from world import CACHE, DEMO, DEMO_WORDS, EVALUATE, TRAIN

NUMBERS = (
    *(
        "epochs",
        "batch",
        "accumulation",
        "seed",
        "clip",
        "data.size",
        "data.resize",
        "data.pad",
        "data.seed",
        "data.views",
    ),
    *("data.threads", "data.prefetch", "data.validation_batch", "data.shuffle_shards", "data.classes", "data.samples"),
    *("optimizer.momentum", "optimizer.weight_decay", "schedule.rate", "schedule.final_rate", "schedule.warmup_epochs"),
    *("schedule.warmup_rate", "ema.decay", "checkpoints.every_steps", "checkpoints.every_epochs", "checkpoints.keep"),
    *("checkpoints.poll_steps", "journal.every_steps", "stop.epoch", "stop.steps", "stop.minutes", "data.flip"),
    *("losses.ce.weight", "losses.ce.label_smoothing", "data.hw_decoder_load"),
)
OTHERS = (
    *(
        "student",
        "losses",
        "data",
        "optimizer",
        "schedule",
        "ema",
        "checkpoints",
        "journal",
        "stop",
        "teacher",
        "compare",
    ),
    *(
        "precision",
        "graph",
        "compress",
        "folder",
        "student.model",
        "student.stages",
        "student.compile",
        "student.start",
    ),
    *("data.path", "data.prepare", "data.loader", "data.crop", "data.scale", "data.ratio", "data.mean", "data.std"),
    *("data.channels_last", "optimizer.kind", "optimizer.nesterov", "schedule.kind", "schedule.milestones"),
    *("journal.trackers", "losses.ce", "losses.kd"),
)
BOUNDS: dict[str, tuple[str, ...]] = {
    "epochs": ("0", "-1", "1.5"),
    "batch": ("0", "-8", "7", "1000000"),
    "accumulation": ("0", "3", "16"),
    "seed": ("-1", "18446744073709551616", "1" + "0" * 40),
    "clip": ("0", "-1"),
    "ema.decay": ("0", "1", "1.5", "-0.1"),
    "data.size": ("0", "-16"),
    "data.resize": ("8", "0"),
    "data.scale": ("[0.5, 2]", "[1, 0.5]", "[0, 1]", "[0.5]"),
    "data.ratio": ("[2, 1]", "[0, 1]", "[-1, 1]"),
    "data.flip": ("1.5", "-0.1"),
    "data.std": ("[0, 0, 0]", "[-1, 1, 1]", "[1, 1]"),
    "data.mean": ("[0.5]", "[0.5, 0.5, 0.5, 0.5]", "0.5"),
    "optimizer.momentum": ("5", "1.5", "-0.5"),
    "optimizer.weight_decay": ("-1",),
    "schedule.rate": ("0", "-0.1"),
    "schedule.warmup_epochs": ("-1", "5"),
    "schedule.milestones": ("[-1]", "[5, 2]"),
    "losses.ce.label_smoothing": ("-0.1", "1.5"),
    "checkpoints.keep": ("0",),
    "stop.minutes": ("0", "-1"),
    "data.views": ("0", "-2"),
}
CONTRADICTIONS: tuple[tuple[str, ...], ...] = (
    ("data.loader=memory",),
    ("teacher={model: cifar_resnet8}",),
    ("teacher={model: cifar_resnet8, weights: teacher.safetensors, recipe: ce.yaml}",),
    ("teacher={average: {decay: 0.9}, model: cifar_resnet8}",),
    ("teacher={members: [{model: cifar_resnet8, weights: teacher.safetensors}]}",),
    ("teacher={cache: cache, accept: [x], average: {decay: 0.5}}",),
    ("losses={kd: {temperature: 4}}",),
    ("student.start={weights: teacher.safetensors, recipe: ce.yaml}",),
    ("student.start={}",),
    ("schedule.kind=step", "schedule.milestones=null", "schedule.warmup_epochs=9"),
    ("optimizer.nesterov=true", "optimizer.momentum=0"),
    ("precision=fp16",),
    ("graph=true",),
    ("losses=null",),
    ("student.stages={last: nowhere}", "losses={ce: {}, fitnet: {stage: last}}"),
)
HUGE = ("1000000", "100000000", "10000000000", "1000000000000000000", "1" + "0" * 60, "1e300", "1e400", "9" * 5000)


def _write(folder: Path, text: str | bytes) -> str:
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    (folder / "bad.yaml").write_bytes(content)
    return "bad.yaml"


def _recipe(folder: Path, random: Random) -> tuple[str, dict[str, Any]]:
    name = random.choice(["ce", "ddkd", "cached"])
    return name, yaml.safe_load((folder / f"{name}.yaml").read_text())


@kind("a value of another type, as a word")
def wrong_type(random: Random, folder: Path) -> Trial:
    key = random.choice(NUMBERS + OTHERS)
    value = random.choice(
        ["x", "[1, 2]", "{a: 1}", "true", "'3'", "2024-01-01", "null", "!!binary aGk=", "0x1F", "1_000"]
    )
    return reading_recipe(f"{key}={value}", random, "ce.yaml", f"{key}={value}")


@kind("a value of another type, in a file")
def spoilt_tree(random: Random, folder: Path) -> Trial:
    name, tree = _recipe(folder, random)
    tree, what = spoil(tree, random)
    return reading_recipe(f"{name}: {what}", random, _write(folder, yaml.dump(tree, allow_unicode=True)))


@kind("a value out of bounds", strict=True)
def out_of_bounds(random: Random, folder: Path) -> Trial:
    key = random.choice(list(BOUNDS))
    word = f"{key}={random.choice(BOUNDS[key])}"
    return training(word, word)


@kind("a number that is not finite", strict=True)
def not_finite(random: Random, folder: Path) -> Trial:
    word = f"{random.choice(NUMBERS)}={random.choice(['.inf', '-.inf', '.nan', '1e999'])}"
    return training(word, word)


@kind("a truth value for a number", strict=True)
def truth(random: Random, folder: Path) -> Trial:
    word = f"{random.choice(NUMBERS)}={random.choice(['true', 'false', 'yes'])}"
    return training(word, word)


@kind("a huge value")
def huge(random: Random, folder: Path) -> Trial:
    word = f"{random.choice(NUMBERS)}={random.choice(HUGE)}"
    return reading_recipe(short(word), random, "ce.yaml", word)


@kind("more than a machine has", strict=True)
def too_much(random: Random, folder: Path) -> Trial:
    much = random.choice(["100000", "100000000"])
    key = random.choice(["", "batch", "data.size", "data.threads", "data.prefetch"])
    if key:
        memory = ["data.size=20", "data.crop=pad", "data.loader=memory"] if random.random() < 0.2 else []
        return training(f"{key}={much}", *memory, f"{key}={much}", "stop.steps=1")
    words = random.choice(
        [("--train", f"{much}00", "--dry-run"), ("--size", much), ("--val", f"{much}00", "--dry-run")]
    )
    return Trial(f"prepare_demo {' '.join(words)}", DEMO, ("new", *DEMO_WORDS, *words))


@kind("an unknown key", strict=True)
def unknown_key(random: Random, folder: Path) -> Trial:
    section = random.choice(["", "data.", "student.", "optimizer.", "schedule.", "losses.ce.", "journal.", "teacher."])
    stray = random.choice(["batsh", "Batch", "x", "é", "__class__", "model_config", "-", "0", "a" * 400, "base", "ce"])
    word = f"{section}{stray}=1"
    if random.random() < 0.5:
        return training(short(word), word)
    tree = yaml.safe_load((folder / "ce.yaml").read_text())
    at = tree
    for part in section.split(".")[:-1]:
        at = at.setdefault(part, {})
    at["stray"] = 1
    return training(f"{section}stray in a file", recipe=_write(folder, yaml.dump(tree)))


@kind("a key twice", strict=True)
def twice(random: Random, folder: Path) -> Trial:
    lines = (folder / "ce.yaml").read_text().splitlines()
    number = random.choice([n for n, line in enumerate(lines) if ":" in line and not line.strip().startswith("-")])
    key = lines[number].split(":")[0]
    return training(
        f"{key.strip()} twice", recipe=_write(folder, "\n".join([*lines[:number], f"{key}: 1", *lines[number:]]))
    )


@kind("a contradiction", strict=True)
def contradiction(random: Random, folder: Path) -> Trial:
    words = random.choice(CONTRADICTIONS)
    return training(" ".join(words), *words)


@kind("text that is damaged")
def damaged_text(random: Random, folder: Path) -> Trial:
    name, _ = _recipe(folder, random)
    text = bytearray((folder / f"{name}.yaml").read_bytes())
    for _ in range(random.choice([1, 1, 2, 8])):
        text[random.randrange(len(text))] = random.choice(b"\x00\t\n :-[]{}'\"!&*#%@`|>?,\xff~9aZ")
    if random.random() < 0.3:
        del text[random.randrange(len(text)) :]
    return reading_recipe(f"{name}.yaml damaged", random, _write(folder, bytes(text)))


@kind("a file that is no recipe", strict=True)
def no_recipe(random: Random, folder: Path) -> Trial:
    texts = [
        "",
        "[]",
        "null",
        "x",
        "3",
        "- a\n- b\n",
        "\t",
        "%YAML 9.9\n---\na: 1",
        "a: 1\n---\nb: 2",
        "\x00",
        "? [a, b]\n: 1",
    ]
    contents = [
        *(text.encode() for text in texts),
        b"\xff\xfe" + "a: 1".encode("utf-16-le"),
        b"\xff\xff",
        bytes(100_000),
    ]
    content = random.choice([*contents, b"{" * 20_000, b"[" * 20_000, b"- " * 20_000, b"a: " * 3000, b"? " * 20_000])
    return reading_recipe(short(content), random, _write(folder, content))


@kind("aliases that grow")
def aliases(random: Random, folder: Path) -> Trial:
    depth, width = random.choice([(3, 3), (9, 9), (30, 2), (9, 40)])
    levels = ["l0: &l0 [1]"] + [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * width)}]" for n in range(1, depth)]
    slots = ["  l0: 1"] + [f"  l{n}: [{', '.join([repr(f'${{l{n - 1}}}')] * width)}]" for n in range(1, depth)]
    ce = (folder / "ce.yaml").read_text()
    texts = {
        "aliases": "\n".join(levels) + "\n" + ce,
        "aliases in compare": ce + "compare: &a [*a]\n",
        "an alias of itself": ce + "teacher: &a {members: [*a]}\n",
        "constants": ce + "constants:\n" + "\n".join(slots) + f"\ncompare: ${{l{depth - 1}}}\n",
        "constants of themselves": ce + "constants: {a: '${b}', b: '${a}'}\nclip: ${a}\n",
        "merge keys": ce
        + "".join(
            f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 9)}]}}\n" if n else "x0: &x0 {a: 1}\n" for n in range(9)
        ),
    }
    what = random.choice(list(texts))
    return reading_recipe(f"{what}, {depth} deep, {width} wide", random, _write(folder, texts[what]))


@kind("a YAML tag", strict=True)
def tags(random: Random, folder: Path) -> Trial:
    tag = random.choice(
        [
            f"!!python/object/apply:os.system ['touch {CANARY}']",
            f"!!python/object/new:os.system ['touch {CANARY}']",
            "!!python/name:os.system",
            "!!python/module:os",
            "!!python/tuple [1]",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "!custom x",
            "!!timestamp x",
            "!!int x",
            "!!float x",
        ]
    )
    key = random.choice(["clip", "compare", "student", "folder", "journal.trackers"])
    if random.random() < 0.5:
        return training(f"{key}={tag}", f"{key}={tag}")
    recipe = _write(folder, "base: ce.yaml\n" + yaml.dump({"seed": 1}) + f"clip: {tag}\n")
    return training(f"clip: {tag} in a file", recipe=recipe)


@kind("a word that says nothing", strict=True)
def words(random: Random, folder: Path) -> Trial:
    word = random.choice(
        [
            *("=", ".=1", "a..b=1", "=1", "data=", "data={", "losses=null", "losses={}", "data={}", "--foo", "-x", "x"),
            *(
                "missing.yaml",
                ".",
                "/",
                "/dev/null",
                "batch==8",
                "batch=8=9",
                "batch=[",
                "batch='",
                "é=1",
                "data.=1",
                "\n=1",
            ),
            *("constants.a=1", "constants=1", "base=ce.yaml", "batch.x=1", "losses.ce.x.y.z=1", "student.model.path=1"),
            *("\udcff=1", "data.path=\udcff", "teacher.members.0.model=x", "a" * 5000, "a." * 3000 + "b=1"),
        ]
    )
    script = random.choice([TRAIN, TRAIN, EVALUATE, CACHE])
    return Trial(f"{script} {short(word)}", script, ("ce.yaml", word))


@kind("a base that is none", strict=True)
def bases(random: Random, folder: Path) -> Trial:
    base = random.choice(
        ["bad.yaml", "missing.yaml", "[1]", "{a: 1}", ".", "/", "''", "[bad.yaml, ce.yaml]", "3", "/dev/null", "[[]]"]
    )
    return training(f"base: {base}", recipe=_write(folder, f"base: {base}\nseed: 1\n"))


@kind("a recipe that is named and is none", strict=True)
def references(random: Random, folder: Path) -> Trial:
    name = random.choice(
        ["missing.yaml", ".", "/dev/null", "teacher.safetensors", "bad.yaml", "''", "shards/manifest.json"]
    )
    word = random.choice(["teacher={{recipe: {}}}", "student.start={{recipe: {}}}", "compare=[{}]"]).format(name)
    recipe = _write(
        folder, "base: ce.yaml\nlosses: {kd: {temperature: 4}}\n" if word.startswith("teacher") else "base: ce.yaml\n"
    )
    return training(word, word, recipe=recipe)


@kind("a folder that cannot be", strict=True)
def folders(random: Random, folder: Path) -> Trial:
    (folder / "own").mkdir()
    (folder / "own" / "journal.jsonl").write_text("mine\n")
    (folder / "own" / "student.safetensors").write_bytes(b"mine")
    name = random.choice(
        [
            "ce.yaml",
            "''",
            "/proc/x",
            "/dev/null",
            "a" * 300,
            "shards",
            "cache",
            "own",
            "own",
            '"\\0"',
            '"a\\0b"',
            "ce.yaml/x",
            "/sys/x",
        ]
    )
    return training(f"folder={short(name)}", f"folder={name}")


@kind("shards that are none", strict=True)
def no_shards(random: Random, folder: Path) -> Trial:
    (folder / "empty").mkdir()
    path = random.choice(
        ["empty", "ce.yaml", "missing", "''", "/dev/null", "/proc/self", "cache", '"a\\0b"', "a" * 300, "half"]
    )
    return reading_recipe(f"data.path={short(path)}", random, "ce.yaml", f"data.path={path}")


@kind("a preparation that is none", strict=True)
def no_preparation(random: Random, folder: Path) -> Trial:
    prepare = random.choice(
        [
            "['']",
            "[missing.py]",
            "[.]",
            "[shards/prepare_demo.py, --foo]",
            "[/dev/null]",
            '["a\\0b"]',
            "[shards/prepare_demo.py, --size, '0']",
        ]
    )
    return training(f"data.prepare={prepare}", f"data.prepare={prepare}", "data.path=new")


OWN_WORDS = {
    CACHE: (
        *(
            "views=0",
            "views=x",
            "block=0",
            "block=-1",
            "kinds=[x]",
            "kinds={}",
            "encode={last: 0}",
            "encode={last: 99}",
        ),
        *("encode=[]", "views=1000000000000", "kinds=['../x']", "sample=0", "tolerance=.nan", "tolerance=-1", "view=2"),
    ),
    EVALUATE: (
        *("weights=", "weights=missing", "weights=shards", "weights=[1]", "weights=/dev/null"),
        *("agreement=maybe", "agreement=yes"),
    ),
    "pipeline/compare.py": (
        *("seeds=x", "seeds=", "seeds=-1", "jobs=0", "jobs=x", "seeds=0,0", "jobs=", "seed=1", "seeds=" + "1" * 50),
    ),
}


@kind("a command's own words", strict=True)
def own_words(random: Random, folder: Path) -> Trial:
    script = random.choice(list(OWN_WORDS))
    recipe, more = ("cached.yaml", "teacher.cache=new") if script == CACHE else ("ce.yaml", "losses={ce: {}}")
    word = random.choice(OWN_WORDS[script])
    return Trial(f"{script} {word}", script, (recipe, word, more))


@kind("an environment that contradicts itself")
def environments(random: Random, folder: Path) -> Trial:
    name, value = random.choice(
        [
            *(
                ("WORLD_SIZE", "x"),
                ("WORLD_SIZE", "0"),
                ("WORLD_SIZE", "-1"),
                ("RANK", "x"),
                ("RANK", "3"),
                ("LOCAL_RANK", "x"),
            ),
            *(
                ("ACCELERATE_DYNAMO_BACKEND", "EAGER"),
                ("ACCELERATE_DYNAMO_BACKEND", "x"),
                ("ACCELERATE_MIXED_PRECISION", "x"),
            ),
            *(("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_USE_MEGATRON_LM", "true"), ("ACCELERATE_USE_CPU", "maybe")),
            *(("PIPELINE_RENDEZVOUS_SECONDS", "x"), ("SLURM_NTASKS", "x"), ("PMI_SIZE", ""), ("PMI_SIZE", "x")),
            *(
                ("OMP_NUM_THREADS", "x"),
                ("SLURM_PROCID", "1"),
                ("CUDA_VISIBLE_DEVICES", "x"),
                ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x"),
            ),
        ]
    )
    return training(f"{name}={value}", **{name: value})


@kind("DeepSpeed's settings")
def deepspeed(random: Random, folder: Path) -> Trial:
    text = random.choice(
        [
            "[]",
            '{"zero_optimization": 2}',
            "{",
            "null",
            "",
            '{"zero_optimization": {"stage": 9}}',
            '{"zero_optimization": {"stage": "x"}}',
            '{"x": 1}',
        ]
    )
    (folder / "zero.json").write_text(text)
    told = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}
    told |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(random.randrange(20_000, 30_000))}
    return training(f"zero.json is {text}", **told)
