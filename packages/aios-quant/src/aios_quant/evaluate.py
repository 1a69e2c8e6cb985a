"""What fewer bits cost and what they bring: a model in several schemes beside the original.

Four figures tell how far a scheme is from the original on the same text. Perplexity, exp of the mean negative
log-likelihood, is what publications quote, and hides errors that cancel. The mean KL divergence of the next-token
distributions cancels nothing and is the finest measure. Greedy agreement is how often the likeliest token is the same.
The common prefix is what a reader sees: how long a greedy answer stays the original's.

Only one model is in memory at a time: of the original, the last hidden states are kept, and its head.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from aios_model.decoder import DecoderModel
from aios_model.errors import ConfigError
from aios_model.layers.linear import Linear
from aios_model.model import Progress, load_decoder, weight_bytes
from aios_model.weights.hub import ModelFiles, resolve_model
from aios_quant.checkpoints.source import quantized_checkpoint
from aios_quant.runner import Runner, kernel_factory, make_runner
from aios_quant.schemes.registry import find_scheme
from aios_quant.transform import quantize_model

# Positions whose logits exist at a time, [64, V] in float32 twice: 20 MB for 49k tokens.
_PIECE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What to compare with the original.

    Attributes:
        name: What to call it.
        model: Folder, file or hub id; None for the original's own weights.
        scheme: As `find_scheme` knows it: what becomes of the weights while they are loaded.
        kv_dtype: How keys and values are kept; other than float32 takes native kernels.
    """

    name: str
    model: str | None
    scheme: str
    kv_dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was measured of one candidate.

    Attributes:
        name: The candidate's.
        perplexity: Of the text.
        kl_divergence: From the original's next-token distribution, mean over positions, in nats.
        agreement: Share of positions whose likeliest token is the original's.
        common_prefix: Tokens that a greedy answer shares with the original's before it differs, mean.
        num_bytes: Of the weights in memory, but for the embedding's rows, which stay in the file.
        tokens_per_second: Decoding one sequence.
    """

    name: str
    perplexity: float
    kl_divergence: float
    agreement: float
    common_prefix: float
    num_bytes: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """All candidates, the original first.

    Attributes:
        model: The original's name.
        text: Where the text came from.
        num_positions: Predictions compared.
        num_answers: Greedy answers compared, of `num_new_tokens` each.
        num_new_tokens: Longest common prefix there can be.
        kernels: What computed, and with how many threads.
        evaluations: In the order asked for.
    """

    model: str
    text: str
    num_positions: int
    num_answers: int
    num_new_tokens: int
    kernels: str
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """How much is compared, and with what.

    Attributes:
        num_answers: Windows whose beginnings are continued greedily.
        num_prompt_tokens: Of each beginning.
        num_new_tokens: Of each answer.
        kernels: `auto` takes native kernels where there are any; `native` insists, `torch` is the reference.
        threads: Of the native kernels; None for the default.
    """

    num_answers: int = 4
    num_prompt_tokens: int = 32
    num_new_tokens: int = 64
    kernels: str = "auto"
    threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """One model on the text: what comparisons need of it."""

    hidden_WSD: Tensor
    head: Linear
    answers: list[list[int]]
    num_bytes: int
    tokens_per_second: float


@torch.inference_mode()
def evaluate(
    model: str | None,
    candidates: Sequence[Candidate],
    tokens_WS: Tensor,
    *,
    text: str,
    settings: EvaluationSettings | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measures the original and each candidate on the same windows of text.

    Args:
        model: The original, as for `load_model`.
        candidates: What to compare with it.
        tokens_WS: int64 [windows, tokens], in the original's vocabulary.
        text: Where they came from, for the report.
        settings: How much is compared.
        progress: Told what is being done and how much of it is done.

    Raises:
        ModelError: A model cannot be read.
        ConfigError: A scheme or a kv_dtype is unknown or does not fit, or the vocabularies differ.
    """
    settings = settings or EvaluationSettings()
    report = progress or (lambda stage, share: None)
    files = resolve_model(model)
    everyone = [Candidate(name="original", model=model, scheme="none"), *candidates]
    reference: _Measured | None = None
    evaluations: list[Evaluation] = []
    for index, candidate in enumerate(everyone):
        report(candidate.name, index / len(everyone))
        source = files if candidate.model is None else resolve_model(candidate.model)
        measured = _measure(source, candidate, tokens_WS, settings)
        reference = reference or measured
        evaluations.append(_compare(candidate.name, measured, reference, tokens_WS))
        del measured
        gc.collect()
    report("done", 1.0)
    return EvaluationReport(
        model=files.name,
        text=text,
        num_positions=tokens_WS.shape[0] * (tokens_WS.shape[1] - 1),
        num_answers=min(settings.num_answers, len(tokens_WS)),
        num_new_tokens=settings.num_new_tokens,
        kernels=kernel_factory(settings.kernels, settings.threads).description,
        evaluations=tuple(evaluations),
    )


def _measure(files: ModelFiles, candidate: Candidate, tokens_WS: Tensor, settings: EvaluationSettings) -> _Measured:
    kernels = kernel_factory(settings.kernels, settings.threads)
    decoder = load_decoder(
        files,
        dtype="float32",
        device="cpu",
        transforms=[quantize_model(find_scheme(candidate.scheme), kernel_factory=kernels.pack)],
        source_transforms=[quantized_checkpoint],
    )
    if int(tokens_WS.max()) >= decoder.config.vocab_size:
        raise ConfigError(
            f"{files.name} knows {decoder.config.vocab_size} tokens, the text holds token {int(tokens_WS.max())}: "
            "compare models with the same tokenizer"
        )
    prompt = min(settings.num_prompt_tokens, tokens_WS.shape[1])
    length = max(tokens_WS.shape[1], prompt + settings.num_new_tokens)
    length = min(length, decoder.config.max_position_embeddings)
    runner = make_runner(decoder, kernels, max_length=length, kv_dtype=candidate.kv_dtype)
    hidden_WSD = torch.stack([runner.start(tokens_S) for tokens_S in tokens_WS])
    answers, seconds = [], 0.0
    for tokens_S in tokens_WS[: settings.num_answers]:
        answer, spent = _continue_greedily(runner, decoder, tokens_S[:prompt], settings.num_new_tokens)
        answers.append(answer)
        seconds += spent
    num_steps = sum(len(answer) - 1 for answer in answers)
    return _Measured(
        hidden_WSD=hidden_WSD,
        head=decoder.head,
        answers=answers,
        num_bytes=weight_bytes(decoder),
        tokens_per_second=num_steps / seconds if seconds else math.nan,
    )


def _continue_greedily(
    runner: Runner, decoder: DecoderModel, prompt_S: Tensor, num_new_tokens: int
) -> tuple[list[int], float]:
    """The likeliest continuation, and the seconds that all tokens after the first took. It does not stop at an end."""
    room = decoder.config.max_position_embeddings - len(prompt_S)
    answer = [int(decoder.logits(runner.start(prompt_S)[-1:]).argmax())]
    started = time.perf_counter()
    while len(answer) < min(num_new_tokens, room):
        hidden_1D = runner.extend(torch.tensor(answer[-1:]))
        answer.append(int(decoder.logits(hidden_1D).argmax()))
    return answer, time.perf_counter() - started


def _compare(name: str, measured: _Measured, reference: _Measured, tokens_WS: Tensor) -> Evaluation:
    surprise = divergence = 0.0
    agreed = count = 0
    for hidden_SD, original_SD, tokens_S in zip(measured.hidden_WSD, reference.hidden_WSD, tokens_WS, strict=True):
        # The last position predicts a token that nobody knows.
        for start in range(0, len(tokens_S) - 1, _PIECE):
            rows = slice(start, min(start + _PIECE, len(tokens_S) - 1))
            ours = torch.log_softmax(measured.head(hidden_SD[rows]), dim=-1)
            theirs = torch.log_softmax(reference.head(original_SD[rows]), dim=-1)
            surprise -= float(ours.gather(1, tokens_S[rows.start + 1 : rows.stop + 1, None]).double().sum())
            divergence += float((theirs.exp() * (theirs - ours)).sum(dim=-1).double().sum())
            agreed += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
            count += len(ours)
    prefixes = [_common_prefix(*pair) for pair in zip(measured.answers, reference.answers, strict=True)]
    return Evaluation(
        name=name,
        perplexity=math.exp(surprise / count),
        kl_divergence=max(0.0, divergence / count),
        agreement=agreed / count,
        common_prefix=sum(prefixes) / max(1, len(prefixes)),
        num_bytes=measured.num_bytes,
        tokens_per_second=measured.tokens_per_second,
    )


def _common_prefix(ours: list[int], theirs: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
