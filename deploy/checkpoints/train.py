"""Train the two small checkpoints of this folder, and measure them.

    python deploy/checkpoints/train.py dense [--steps N | --minutes N] [--out DIR]
    python deploy/checkpoints/train.py moe   [--steps N | --minutes N] [--out DIR]
    python deploy/checkpoints/train.py eval DIR

Text: the ``*.py`` sources of the running interpreter's standard library, in the order of
their relative paths, without tests, codec tables, installed packages and generated
build settings.  About 3 % of the files, chosen by a hash of the relative path, are held
out: neither the tokenizer nor the weights ever see them.  Part of the training text is
dialogues in the checkpoint's own chat format, made from docstrings of training files.

Training: fp32 on one CPU thread, AdamW, linear warm-up and cosine decay over the number
of steps.  The same interpreter, libraries and step count give the same run up to the
rounding of the machine's arithmetic.  ``--minutes`` only picks a step count, from a few
timed steps.  The seed is fixed.

Result: a Hugging Face folder with bf16 weights, written beside its final place and
renamed into it, at the end and every ten minutes on the way; ``training.json`` in it
says how far the weights have come.

``eval`` prints the bits per byte of the held-out text under the saved weights, and under
``xz -9`` (lzma preset 9), alone and with the training text compressed before it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import logging
import lzma
import math
import os
import platform
import random
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils.logging import disable_progress_bar

log = logging.getLogger("train")

HERE = Path(__file__).resolve().parent
SEED = 20240229
END, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIALS = [END, IM_START, IM_END, PAD]  # their ids are 0, 1, 2, 3
VOCABULARY = 2048
MAX_POSITIONS = 2048

# Most steps see windows of WINDOW tokens; every LONG_EVERY-th one sees windows of LONG_WINDOW,
# so that positions past the short window are trained too.
TOKENS_PER_STEP, WINDOW, LONG_WINDOW, LONG_EVERY = 2048, 256, 1024, 4
PEAK_RATE, FLOOR, WARM_UP = 2.5e-3, 0.03, 0.04
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.1, 1.0
SAVE_SECONDS = 600.0
EVAL_WINDOW, EVAL_STRIDE = 512, 256

CHAT_SHARE = 0.08
SYSTEM = "You answer questions about the Python standard library."
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SKIPPED = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idle_test",
        "lib-dynload",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
    }
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "_sysconfig_vars")


@dataclass(frozen=True)
class Recipe:
    """One checkpoint: its folder, its committed step count and its shape."""

    folder: str
    steps: int
    config: dict[str, Any]
    sparse: bool = False


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": MAX_POSITIONS,
    "head_dim": 32,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 3,
    "use_cache": True,
}
RECIPES = {
    "dense": Recipe(
        "tiny-qwen3",
        3000,
        {
            "hidden_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "intermediate_size": 512,
        },
    ),
    "moe": Recipe(
        "tiny-qwen3-moe",
        6000,
        {
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.01,
        },
        sparse=True,
    ),
}


@dataclass(frozen=True)
class Source:
    """One standard library file: its relative path and its text."""

    path: str
    text: str


def read_sources() -> tuple[list[Source], list[Source]]:
    """The training files and the held-out files, each in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[Source] = []
    held: list[Source] = []
    relatives = (path.relative_to(root) for path in root.rglob("*.py"))
    for relative in sorted(relatives, key=lambda path: path.as_posix()):
        if any(part in SKIPPED or part.startswith(SKIPPED_PREFIXES) for part in relative.parts):
            continue
        try:
            text = (root / relative).read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if text.strip():
            source = Source(relative.as_posix(), text)
            (held if is_held_out(source.path) else train).append(source)
    return train, held


def is_held_out(path: str) -> bool:
    """Whether the file at this relative path is kept from training."""
    digest = hashlib.sha256(path.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % 100 < 3


def module_name(path: str) -> str:
    """The dotted name that imports the file at this relative path."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def described(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """A question and its answer for every documented definition under the node."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        answer = first_paragraph(ast.get_docstring(node, clean=False))
        if 16 <= len(answer) <= 400:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield f"What does {name} do?" if is_function else f"What is {name}?", answer
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from described(child, f"{name}.{child.name}")


def first_paragraph(docstring: str | None) -> str:
    """The docstring's first paragraph on one line; empty without a docstring."""
    paragraph = inspect.cleandoc(docstring or "").split("\n\n", 1)[0]
    return " ".join(paragraph.split())


def render_chat(messages: list[tuple[str, str]]) -> str:
    """What CHAT_TEMPLATE makes of finished (role, content) messages."""
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in messages)


def dialogues(sources: list[Source]) -> list[str]:
    """Chat documents of one or two exchanges, every other one with a system message."""
    documents: list[str] = []
    for source in sources:
        pairs = list(described(ast.parse(source.text), module_name(source.path)))
        while pairs:
            count = 1 + len(documents) % 3 // 2
            messages = [("system", SYSTEM)] if len(documents) % 2 else []
            for question, answer in pairs[:count]:
                messages += [("user", question), ("assistant", answer)]
            documents.append(render_chat(messages))
            del pairs[:count]
    return documents


def training_documents(sources: list[Source]) -> list[str]:
    """The files, and as many dialogues as CHAT_SHARE of the total allows."""
    documents = [source.text for source in sources]
    room = sum(map(len, documents)) * CHAT_SHARE / (1 - CHAT_SHARE)
    chats = dialogues(sources)
    random.Random(SEED).shuffle(chats)
    for chat in chats:
        room -= len(chat)
        if room < 0:
            break
        documents.append(chat)
    return documents


def train_tokenizer(sources: list[Source]) -> Tokenizer:
    """A byte-level BPE tokenizer of the training files; it loses no byte of any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((source.text for source in sources), trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[torch.Tensor]:
    """Each document's token ids, closed by the end token."""
    end = tokenizer.token_to_id(END)
    return [torch.tensor([*tokenizer.encode(text).ids, end]) for text in documents]


def windows(documents: list[torch.Tensor], length: int) -> Iterator[torch.Tensor]:
    """Endless batches of windows; each epoch packs and orders the documents anew."""
    rows = TOKENS_PER_STEP // length
    epoch = 0
    while True:
        order = random.Random(f"{SEED} {length} {epoch}")
        shuffled = list(documents)
        order.shuffle(shuffled)
        stream = torch.cat(shuffled)
        count = len(stream) // length
        table = stream[: count * length].view(count, length)
        picks = list(range(count))
        order.shuffle(picks)
        for start in range(0, count - rows + 1, rows):
            yield table[picks[start : start + rows]]
        epoch += 1


def batches(documents: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Endless training batches, one a step: short windows, and now and then long ones."""
    short, long = windows(documents, WINDOW), windows(documents, LONG_WINDOW)
    while True:
        for _ in range(LONG_EVERY - 1):
            yield next(short)
        yield next(long)


def build_model(recipe: Recipe) -> Any:
    """The untrained fp32 model."""
    torch.manual_seed(SEED)
    config_class = Qwen3MoeConfig if recipe.sparse else Qwen3Config
    config = config_class(**COMMON, **recipe.config)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def build_optimizer(model: Any) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves norm weights alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=BETAS, fused=True)


def rate_at(step: int, steps: int) -> float:
    """The learning rate of a step: linear warm-up, then cosine down to the floor."""
    warm = max(1, round(steps * WARM_UP))
    if step < warm:
        return PEAK_RATE * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return PEAK_RATE * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_step(
    recipe: Recipe, model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor
) -> float:
    """One optimizer step on one batch; the loss before it, in nats per token."""
    extra = {"output_router_logits": True} if recipe.sparse else {}
    loss = model(input_ids=batch, labels=batch, use_cache=False, **extra).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return float(loss.detach())


def steps_for(recipe: Recipe, documents: list[torch.Tensor], minutes: float) -> int:
    """The step count that takes about that long here, timed on a model thrown away."""
    model = build_model(recipe)
    optimizer = build_optimizer(model)
    source = batches(documents)
    train_step(recipe, model, optimizer, next(source))
    start = time.perf_counter()
    for _ in range(4 * LONG_EVERY):
        train_step(recipe, model, optimizer, next(source))
    seconds = (time.perf_counter() - start) / (4 * LONG_EVERY)
    log.info("%.3f s a step, %.0f tokens/s", seconds, TOKENS_PER_STEP / seconds)
    return max(LONG_EVERY, int(minutes * 60 / seconds))


def fit(
    recipe: Recipe, tokenizer: Tokenizer, documents: list[torch.Tensor], steps: int, out: Path
) -> None:
    """Train for that many steps and leave the checkpoint in the folder."""
    model = build_model(recipe)
    optimizer = build_optimizer(model)
    start = saved = time.perf_counter()
    smooth = 0.0
    for step, batch in zip(range(steps), batches(documents), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        loss = train_step(recipe, model, optimizer, batch)
        keep = min(0.99, step / (step + 10))
        smooth = keep * smooth + (1 - keep) * loss
        now = time.perf_counter()
        last = step + 1 == steps
        if last or (step + 1) % 100 == 0:
            log.info("step %d/%d loss %.4f %.0f s", step + 1, steps, smooth, now - start)
        if last or now - saved > SAVE_SECONDS:
            saved = now
            progress = {
                "step": step + 1,
                "steps": steps,
                "tokens_seen": (step + 1) * TOKENS_PER_STEP,
                "tokens_in_corpus": sum(map(len, documents)),
                "smoothed_training_loss": round(smooth, 4),
                "wall_seconds": round(now - start),
                "parameters": sum(p.numel() for p in model.parameters()),
                "python": platform.python_version(),
                "torch": torch.__version__,
            }
            save(model, tokenizer, progress, out)


def save(model: Any, tokenizer: Tokenizer, progress: dict[str, Any], out: Path) -> None:
    """Write the checkpoint beside its folder, then put it in the folder's place."""
    fresh = out.with_name(f".{out.name}.new")
    stale = out.with_name(f".{out.name}.old")
    for path in (fresh, stale):
        shutil.rmtree(path, ignore_errors=True)
    fresh.mkdir(parents=True)
    copy = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=[SPECIALS.index(END), SPECIALS.index(IM_END)],
        pad_token_id=SPECIALS.index(PAD),
    )
    copy.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)
    spell_out_config(fresh)
    save_tokenizer(tokenizer, fresh)
    (fresh / "training.json").write_text(json.dumps(progress, indent=2) + "\n", "utf-8")
    if out.exists():
        out.rename(stale)
    fresh.rename(out)
    shutil.rmtree(stale, ignore_errors=True)


def spell_out_config(folder: Path) -> None:
    """Add to config.json the older names of two settings, as published checkpoints have them."""
    path = folder / "config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings["rope_theta"] = settings["rope_parameters"]["rope_theta"]
    if "num_local_experts" in settings:
        settings["num_experts"] = settings["num_local_experts"]
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the settings that AutoTokenizer reads with it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "added_tokens_decoder": {
            str(number): {"content": token, **flags, "special": True}
            for number, token in enumerate(SPECIALS)
        },
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": MAX_POSITIONS,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, "utf-8")


def held_out_nats(model: Any, stream: torch.Tensor) -> float:
    """The summed nats of every token of the stream but its first.

    Windows of EVAL_WINDOW tokens start every EVAL_STRIDE tokens.  A token is scored once,
    in the first window that predicts it, so after the first window each has at least
    EVAL_WINDOW - EVAL_STRIDE tokens before it.
    """
    total = 0.0
    scored = 1
    for start in range(0, len(stream), EVAL_STRIDE):
        window = stream[start : start + EVAL_WINDOW]
        end = start + len(window)
        if end > scored:
            with torch.inference_mode():
                logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
            fresh = end - scored
            total += float(
                torch.nn.functional.cross_entropy(
                    logits[-fresh:].float(), window[-fresh:], reduction="sum"
                )
            )
            scored = end
    return total


def evaluate(folder: Path) -> None:
    """Print the held-out bits per byte of a saved checkpoint, and those of xz."""
    train, held = read_sources()
    text = "".join(source.text for source in held).encode("utf-8")
    before = "".join(source.text for source in train).encode("utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    ids = [tokenizer.eos_token_id]
    for source in held:
        ids += [*tokenizer(source.text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    nats = held_out_nats(model, torch.tensor(ids))
    alone = len(lzma.compress(text, preset=9))
    after = len(lzma.compress(before + text, preset=9)) - len(lzma.compress(before, preset=9))
    result = {
        "held_out_files": len(held),
        "held_out_bytes": len(text),
        "held_out_tokens": len(ids) - 1,
        "bits_per_byte": round(nats / math.log(2) / len(text), 4),
        "xz_bits_per_byte": round(alone * 8 / len(text), 4),
        "xz_after_training_text_bits_per_byte": round(after * 8 / len(text), 4),
    }
    print(json.dumps(result, indent=2))


def run_training(recipe: Recipe, steps: int | None, minutes: float | None, out: Path) -> None:
    """Read the text, train the tokenizer and the weights, and leave the checkpoint."""
    train, held = read_sources()
    log.info("%d training files, %d held out", len(train), len(held))
    tokenizer = train_tokenizer(train)
    documents = encode_documents(tokenizer, training_documents(train))
    log.info("%d documents, %d tokens", len(documents), sum(map(len, documents)))
    if steps is None:
        steps = recipe.steps if minutes is None else steps_for(recipe, documents, minutes)
    fit(recipe, tokenizer, documents, steps, out)


def main() -> None:
    """Read the command line and do what it asks."""
    parser = argparse.ArgumentParser(description="Train or measure the small checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, recipe in RECIPES.items():
        command = commands.add_parser(name, help=f"train {recipe.folder}")
        length = command.add_mutually_exclusive_group()
        length.add_argument("--steps", type=int, help=f"default {recipe.steps}")
        length.add_argument("--minutes", type=float, help="pick the steps for this long")
        command.add_argument("--out", type=Path, default=HERE / recipe.folder)
    commands.add_parser("eval", help="measure a checkpoint").add_argument("folder", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    disable_progress_bar()
    torch.set_num_threads(1)
    if options.command == "eval":
        evaluate(options.folder)
        return
    recipe = RECIPES[options.command]
    run_training(recipe, options.steps, options.minutes, options.out.absolute())


if __name__ == "__main__":
    main()
