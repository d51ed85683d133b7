"""Adapters in slices: the same tokens as PEFT's, exact switching, and nothing wrong is taken."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import (
    ATTENTION,
    CONFIG,
    DENSE,
    WEIGHTS,
    changed,
    load_adapted,
    save_adapter,
    tensors_of,
)
from identity import check_identical, generate
from peft.tuners.lora import LoraLayer
from tiny_models import ARCHITECTURES, MOE

from actors.engine.adapter import Adapter, AdapterError, is_adapter_folder
from actors.engine.batch import Draw, Rows, StepBatch
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.local import LocalPipeline
from actors.engine.lora import check_fits
from actors.engine.requests import Request, SamplingParams
from actors.engine.slice import StageSlice

pytestmark = pytest.mark.engine

PROMPTS = ((5, 17, 9, 101, 44, 3, 78, 150, 23, 9), (7,), tuple(range(20, 58)))
NUM_NEW = 12
CUTS = (1, 4)


@pytest.fixture(scope="module")
def adapter_dir(
    checkpoint_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Make (once) an adapter for an architecture: `adapter_dir(model_type, seed=..., ...)`."""
    made: dict[str, Path] = {}

    def make(model_type: str, **how: Any) -> Path:
        key = repr((model_type, sorted(how.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("adapters") / f"{model_type}-{len(made)}"
            made[key] = save_adapter(checkpoint_dir(model_type), folder, **how)
        return made[key]

    return make


@pytest.fixture(scope="module")
def qwen3(checkpoint_dir: Callable[..., Path]) -> Path:
    return checkpoint_dir("qwen3")


def targets_of(model_type: str) -> tuple[str, ...]:
    return ATTENTION if model_type in MOE else DENSE


def open_pipeline(path: Path, cuts: Sequence[int] = CUTS) -> LocalPipeline:
    config = EngineConfig(kv_block_tokens=4, num_kv_blocks=64, max_step_tokens=32)
    return LocalPipeline(Checkpoint.open(str(path)), cuts, config=config)


def load(pipeline: LocalPipeline, version: int, folder: Path, *, keep: int = 0) -> None:
    adapter = Adapter.decode(Adapter.read(folder).encode())
    for stage in pipeline.stages:
        stage.adapters.load(version, adapter, keep=keep)


def tokens(pipeline: LocalPipeline, prompts: Sequence[tuple[int, ...]] = PROMPTS) -> list[Any]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)
    done = pipeline.generate(
        Request(id=str(i), prompt=prompt, sampling=sampling) for i, prompt in enumerate(prompts)
    )
    return [done[str(i), 0].tokens for i in range(len(prompts))]


def open_slice(path: Path, first: int, end: int, **how: Any) -> StageSlice:
    return StageSlice(
        Checkpoint.open(str(path)), first, end, config=EngineConfig(), num_kv_blocks=4, **how
    )


def step(version: int, prompt: Sequence[int] = PROMPTS[0]) -> StepBatch:
    return StepBatch(
        0, 0, 0, list(prompt), [Rows(0, len(prompt), [0])], drawn=[0], draws=[Draw(0, len(prompt))],
        adapter_version=version,
    )  # fmt: skip


def rows(stage: StageSlice, version: int) -> torch.Tensor:
    return stage.run_layers(step(version), None).clone()


# --- the same as PEFT -------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_tokens_through_uneven_stages_are_pefts(
    model_type: str, checkpoint_dir: Callable[..., Path], adapter_dir: Callable[..., Path]
) -> None:
    base = checkpoint_dir(model_type)
    folder = adapter_dir(model_type, targets=targets_of(model_type))
    expected = [generate(load_adapted(base, folder), p, NUM_NEW) for p in PROMPTS]
    pipeline = open_pipeline(base)
    plain = tokens(pipeline)

    check_fits(Adapter.read(folder), Checkpoint.open(str(base)))
    load(pipeline, 1, folder)
    pipeline.scheduler.use_adapter(1)
    got = tokens(pipeline)

    check_identical(expected, got)
    assert got != plain, "the adapter changes nothing; the test proves nothing"


@pytest.mark.parametrize(
    "how",
    [
        {"use_rslora": True, "rank": 8},
        {"rank_pattern": {"q_proj": 2, r"layers\.5\..*v_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        {"layers_to_transform": [0, 4]},
        {"dtype": torch.bfloat16},
        {"lora_dropout": 0.5, "targets": ("down_proj", "self_attn.o_proj")},
    ],
    ids=["rslora", "patterns", "some-layers", "bfloat16", "dropout"],
)
def test_logits_are_pefts_with_the_options_that_are_honoured(
    how: dict[str, Any], qwen3: Path, adapter_dir: Callable[..., Path]
) -> None:
    folder = adapter_dir("qwen3", seed=3, **how)
    with torch.inference_mode():
        wanted = load_adapted(qwen3, folder)(torch.tensor([PROMPTS[0]])).logits[0]
    check_fits(Adapter.read(folder), Checkpoint.open(str(qwen3)))
    pipeline = open_pipeline(qwen3)
    load(pipeline, 1, folder)

    hidden: torch.Tensor | None = None
    batch = StepBatch(
        0, 0, 0, list(PROMPTS[0]), [Rows(0, 10, [0, 1, 2])], adapter_version=1
    )  # fmt: skip
    for stage in pipeline.stages:
        hidden = stage.run_layers(batch, hidden)
    assert hidden is not None

    assert (pipeline.stages[-1].logits(hidden) - wanted).abs().max() < 1e-4


# --- versions ---------------------------------------------------------------------------------


def test_versions_alternate_and_each_stays_bit_for_bit_the_same(
    qwen3: Path, adapter_dir: Callable[..., Path]
) -> None:
    stage = open_slice(qwen3, 0, 3)
    plain = rows(stage, 0)
    stage.adapters.load(1, Adapter.read(adapter_dir("qwen3", seed=1)), keep=0)
    first = rows(stage, 1)
    stage.adapters.load(2, Adapter.read(adapter_dir("qwen3", seed=2, targets=DENSE)), keep=1)
    second = rows(stage, 2)

    assert stage.adapters.versions == (0, 1, 2)
    assert not torch.equal(plain, first)
    assert not torch.equal(first, second)
    for version, wanted in ((1, first), (2, second), (0, plain), (2, second), (1, first)):
        assert torch.equal(rows(stage, version), wanted)
    assert torch.equal(rows(open_slice(qwen3, 0, 3), 0), plain)


def test_version_0_runs_the_base_layers_themselves(
    qwen3: Path, adapter_dir: Callable[..., Path]
) -> None:
    stage = open_slice(qwen3, 0, 2)
    base = [type(m) for m in stage.layers[0].modules()]
    stage.adapters.load(1, Adapter.read(adapter_dir("qwen3")), keep=0)
    assert [type(m) for m in stage.layers[0].modules()] == base, "loading alone changes the slice"

    stage.adapters.use(1)
    assert isinstance(stage.layers[0].self_attn.q_proj, LoraLayer)
    stage.adapters.use(0)
    assert [type(m) for m in stage.layers[0].modules()] == base


def test_of_the_versions_before_only_the_one_in_use_is_kept(
    qwen3: Path, adapter_dir: Callable[..., Path]
) -> None:
    stage = open_slice(qwen3, 0, 2)
    adapter = Adapter.read(adapter_dir("qwen3"))
    stage.adapters.load(1, adapter, keep=0)
    stage.adapters.load(2, adapter, keep=1)  # its publication fails elsewhere
    stage.adapters.load(3, adapter, keep=1)
    assert stage.adapters.versions == (0, 1, 3)

    with pytest.raises(ValueError, match=r"version 2 is not loaded; there are \[0, 1, 3\]"):
        stage.run_layers(step(2), None)
    stage.run_layers(step(3), None)


def test_a_slice_takes_the_matrices_of_its_own_layers(
    qwen3: Path, adapter_dir: Callable[..., Path]
) -> None:
    adapter = Adapter.read(adapter_dir("qwen3", layers_to_transform=[0, 2, 3, 5]))
    middle, without = open_slice(qwen3, 2, 5), open_slice(qwen3, 4, 5)
    for stage in (middle, without):
        stage.adapters.load(1, adapter, keep=0)

    wanted = {f"model.layers.{i}.self_attn.{name}" for i in (2, 3) for name in ATTENTION}
    assert set(middle.adapters.modules(1)) == set(adapter.modules(2, 5)) == wanted
    assert without.adapters.modules(1) == ()
    stored = tensors_of(adapter_dir("qwen3", layers_to_transform=[0, 2, 3, 5]))
    middle.adapters.use(1)
    held = middle.layers[1].self_attn.v_proj.lora_B["motley"].weight
    assert torch.equal(
        held, stored["base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"]
    )
    assert not held.requires_grad


def test_loading_beside_a_step_does_not_disturb_it(
    qwen3: Path, adapter_dir: Callable[..., Path]
) -> None:
    stage = open_slice(qwen3, 0, 6)
    adapter = Adapter.read(adapter_dir("qwen3", targets=DENSE))
    stage.adapters.load(1, adapter, keep=0)
    wanted = rows(stage, 1)
    done = threading.Event()

    def publish() -> None:
        for version in range(2, 12):
            stage.adapters.load(version, adapter, keep=1)
        done.set()

    thread = threading.Thread(target=publish)
    thread.start()
    results = [rows(stage, 1)]
    while not done.is_set():
        results.append(rows(stage, 1))
    thread.join()

    assert all(torch.equal(result, wanted) for result in results)
    assert torch.equal(rows(stage, 11), wanted)


def test_a_switch_shares_no_kv_of_the_old_weights_with_newcomers(
    qwen3: Path, adapter_dir: Callable[..., Path]
) -> None:
    folder = adapter_dir("qwen3")
    expected = generate(load_adapted(qwen3, folder), PROMPTS[2], NUM_NEW)
    pipeline = open_pipeline(qwen3)
    plain = tokens(pipeline, [PROMPTS[2]])
    hits = pipeline.scheduler.prefix_hit_tokens
    load(pipeline, 1, folder)
    pipeline.scheduler.use_adapter(1)

    check_identical([expected], tokens(pipeline, [PROMPTS[2]]))
    assert pipeline.scheduler.prefix_hit_tokens == hits == 0
    tokens(pipeline, [PROMPTS[2]])
    assert pipeline.scheduler.prefix_hit_tokens > 0, "the new weights' own KV is shared"

    pipeline.scheduler.use_adapter(0)
    assert tokens(pipeline, [PROMPTS[2]]) == plain


# --- what is refused --------------------------------------------------------------------------


def test_the_bytes_form_is_the_folder(adapter_dir: Callable[..., Path]) -> None:
    read = Adapter.read(adapter_dir("qwen3", dtype=torch.bfloat16))
    sent = Adapter.decode(memoryview(read.encode()))

    assert (sent.name, sent.config) == (read.name, read.config)
    for module, pair in read.pairs.items():
        for ours, theirs in zip(pair, sent.pairs[module], strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert read.bytes_of(ours) == sent.bytes_of(theirs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; LORA is"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \(\['lm_head'\]\) is not supported"),
        ({"use_dora": True}, "use_dora .* is not supported"),
        ({"target_parameters": ["gate_up_proj"]}, "target_parameters .* is not supported"),
        ({"from_the_future": {"a": 1}}, "from_the_future .* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base weights"),
        ({"r": 0}, r"r \(0\) must be a whole number above 0"),
        ({"r": 5}, r"shape \(4, 48\) .* of rank 5 they are \(rank, in\) and \(out, rank\)"),
        ({"lora_alpha": "8"}, "lora_alpha .* must be a number"),
        ({"target_modules": None}, r"target_modules \(None\) must be a list of module names"),
        ({"target_modules": ["q_proj", 5]}, "target_modules .* must be a list of module names"),
        ({"rank_pattern": [1]}, r"rank_pattern \(\[1\]\) must be an object"),
    ],
)
def test_kinds_of_adapter_that_are_not_served_are_named(
    config: dict[str, Any], message: str, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder = changed(adapter_dir("qwen3"), tmp_path / "other", **config)

    with pytest.raises(AdapterError, match=message):
        Adapter.read(folder)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


Tensors = dict[str, torch.Tensor]


def without_a_half(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name != f"{Q0}.lora_B.weight"}


def one_changed(name: str, *shape: int, value: float = 1.0, dtype: Any = torch.float32) -> Any:
    return lambda tensors: tensors | {name: torch.full(shape, value, dtype=dtype)}


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (one_changed(f"{Q0}.lora_A.weight", 3, 48), "q_proj has lora_A of shape"),
        (without_a_half, "lora_A without its counterpart"),
        (one_changed(f"{Q0}.lora_A.weight", 4, 48, value=torch.nan), "lora_A of .*q_proj holds"),
        (
            one_changed(f"{Q0}.lora_B.weight", 64, 4, value=torch.inf, dtype=torch.bfloat16),
            "lora_B of .*q_proj holds values that are not finite",
        ),
        (one_changed("base_model.model.lm_head.lora_A.weight", 4, 48), "lm_head.* not supported"),
        (one_changed(f"{Q0}.lora_A.weight", 4, 48, dtype=torch.int64), "not of type F64, F32"),
        (one_changed(f"{Q0}.lora_A.weight", 4), "shape"),
        (lambda _: {}, "holds no tensors"),
    ],
    ids=["rank", "half", "nan", "inf-bfloat16", "head", "integers", "vector", "empty"],
)
def test_damaged_matrices_are_refused(
    alter: Callable[[Tensors], Tensors],
    message: str,
    adapter_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = adapter_dir("qwen3")
    folder = changed(source, tmp_path / "other", tensors=alter(tensors_of(source)))

    with pytest.raises(AdapterError, match=message):
        Adapter.read(folder)


def test_every_truncation_is_refused(adapter_dir: Callable[..., Path]) -> None:
    whole = Adapter.read(adapter_dir("qwen3")).encode()

    for length in (0, 3, 8, 100, len(whole) // 2, len(whole) - 1):
        with pytest.raises(AdapterError, match="truncated"):
            Adapter.decode(whole[:length])


def test_a_file_without_its_configuration_is_refused(adapter_dir: Callable[..., Path]) -> None:
    with pytest.raises(AdapterError, match="send it with `motley publish`"):
        Adapter.decode((adapter_dir("qwen3") / WEIGHTS).read_bytes())


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"5",
        b'{"a": 5}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0]}}',
        b'{"a": {"dtype": [], "shape": [1, 1], "data_offsets": [0.0, 4.0]}}',
        b'{"__metadata__": {"adapter_name": "", "adapter_config": "{}"}}',
        b'{"__metadata__": {"adapter_name": 5, "adapter_config": "{}"}}',
        b'{"__metadata__": {"adapter_name": "a", "adapter_config": "[]"}}',
        b'{"__metadata__": [5]}',
    ],
)
def test_any_header_is_an_adapter_or_an_adapter_error(header: bytes) -> None:
    with pytest.raises(AdapterError):
        Adapter.decode(len(header).to_bytes(8, "little") + header)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path, qwen3: Path) -> None:
    with pytest.raises(AdapterError, match=f"{CONFIG}: cannot be read"):
        Adapter.read(qwen3)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    with pytest.raises(AdapterError, match=f"{WEIGHTS}: cannot be read"):
        Adapter.read(tmp_path)


def test_an_adapter_folder_is_told_from_a_checkpoint(
    qwen3: Path, adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    assert is_adapter_folder(adapter_dir("qwen3"))
    assert not is_adapter_folder(qwen3)
    (tmp_path / CONFIG).touch()
    (tmp_path / "model.safetensors").touch()
    assert not is_adapter_folder(tmp_path)


# --- what does not fit the base ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": [*ATTENTION, "w_pack"]}, "the model has no module 'w_pack'"),
        ({"target_modules": "nothing.*"}, "not found in the base model"),
        ({"target_modules": "("}, "adapter other on original"),
        ({"target_modules": ["q_proj"]}, "modules are not among the model's targets"),
        ({"target_modules": [*ATTENTION, "up_proj"]}, "covers .*up_proj, but its matrices"),
        ({"target_modules": [*ATTENTION, "q_norm"]}, "has 'q_norm', in the model a Qwen3RMSNorm"),
        ({"target_modules": [*ATTENTION, "lm_head"]}, "lm_head is not supported"),
        ({"rank_pattern": {"q_proj": 3}}, r"lora_A of .*q_proj has shape .* \(3, 48\) fits"),
    ],
)
def test_targets_that_the_base_lacks_are_refused(
    config: dict[str, Any],
    message: str,
    qwen3: Path,
    adapter_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    adapter = Adapter.read(changed(adapter_dir("qwen3"), tmp_path / "other", **config))

    with pytest.raises(AdapterError, match=message):
        check_fits(adapter, Checkpoint.open(str(qwen3)))


def test_the_adapter_of_another_base_is_refused(
    qwen3: Path, checkpoint_dir: Callable[..., Path], adapter_dir: Callable[..., Path]
) -> None:
    adapter = Adapter.read(adapter_dir("llama"))

    with pytest.raises(AdapterError, match=r"has shape .* fits; is it another base model's\?"):
        check_fits(adapter, Checkpoint.open(str(qwen3)))
    with pytest.raises(AdapterError, match="fits"):
        open_slice(qwen3, 0, 2).adapters.load(1, adapter, keep=0)


def test_experts_are_refused_by_name(
    checkpoint_dir: Callable[..., Path], adapter_dir: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoint_dir("qwen3_moe")
    folder = changed(adapter_dir("qwen3_moe"), tmp_path / "other", target_modules=["experts"])

    with pytest.raises(AdapterError, match="has 'experts', in the model a Qwen3MoeExperts"):
        check_fits(Adapter.read(folder), Checkpoint.open(str(path)))
