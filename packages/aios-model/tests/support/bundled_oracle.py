"""The bundled model as transformers runs it, on weights that the gguf package dequantised to float32.

`greedy_tokens.json` beside this file holds 20 prompts and the 64 tokens that transformers answers each with, greedily;
at every one of them the two likeliest logits differ by more than 1e-3, so any correct float32 implementation gives
the same. Made by `python packages/aios-model/tests/support/bundled_oracle.py`. The tests of aios-model hold it against
a live transformers model, and upper layers hold their engines against the file.
"""

from __future__ import annotations

import json
from pathlib import Path

GREEDY_TOKENS = Path(__file__).with_name("greedy_tokens.json")
NUM_TOKENS = 64
MARGIN = 1e-3


def greedy_cases() -> list[dict]:
    """`{"prompt": str, "prompt_token_ids": [...], "token_ids": [...]}`, twenty of them."""
    return json.loads(GREEDY_TOKENS.read_text())


def bundled_path() -> Path:
    from aios_model.weights.hub import resolve_model

    return resolve_model(None).weight_paths[0]


def transformers_model():
    """The bundled model in transformers, float32. Takes about ten seconds and 600 MB."""
    import gguf
    import torch
    import transformers

    reader = gguf.GGUFReader(bundled_path())
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    model = transformers.LlamaForCausalLM(config).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    theirs = {
        names.get_name(name.removesuffix(".weight")): name for name in model.state_dict() if "lm_head" not in name
    }
    with torch.no_grad():
        for tensor in reader.tensors:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values = torch.from_numpy(array.copy()).float()
            name = theirs[tensor.name.removesuffix(".weight")]
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = 9 if "q_proj" in name else 3
                values = values.view(heads, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)
            model.state_dict()[name].copy_(values.view_as(model.state_dict()[name]))
    return model


def smallest_margin(model, prompt_token_ids: list[int], token_ids: list[int]) -> float:
    """The smallest gap between the two likeliest logits along `token_ids`; -inf if they are not the greedy answer.

    One pass over prompt and answer: if every token is the likeliest after those before it, greedy decoding gives it.
    """
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([prompt_token_ids + token_ids[:-1]])).logits[0, len(prompt_token_ids) - 1 :]
    best = logits.topk(2, dim=-1)
    if best.indices[:, 0].tolist() != token_ids:
        return float("-inf")
    return (best.values[:, 0] - best.values[:, 1]).min().item()


def propose_answers(model, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers of all prompts in one batch, padded on the left; `smallest_margin` confirms them one by one."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 2}
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()


CANDIDATES = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, humans first",
    "To bake bread you need flour, water, salt and",
    "1, 2, 3, 4, 5,",
    "The mitochondrion is",
    "Question: Why is the sky blue?\nAnswer:",
    "import numpy as np\n\n",
    "She opened the door and",
    "An operating system is",
    "The quick brown fox",
    "Translate to French: Good morning ->",
    "Photosynthesis is the process by which",
    "SELECT name, age FROM",
    "My favourite book is",
    "Water boils at",
    "The history of Rome begins",
    "A haiku about autumn:\n",
    "The largest planet in the solar system",
    "Machine learning is a branch of",
    "Roses are red, violets are",
    "The president of the United States",
    "Step 1: Preheat the oven.\nStep 2:",
    "If x + 3 = 10, then x =",
    "The Great Wall of China was",
    "Once the rain had stopped,",
    "for i in range(10):\n",
    "Shakespeare wrote",
    "The human heart has",
    "According to the report,",
    "Python is a programming language that",
    "The moon orbits",
    "<|im_start|>user\nWhat is a prime number?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a short poem about the sea.<|im_end|>\n<|im_start|>assistant\n",
)


def main() -> None:
    """Writes `greedy_tokens.json`: the first twenty candidates whose margins are wide enough throughout."""
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_model.weights.hub import resolve_model

    tokenizer, model = Tokenizer.from_files(resolve_model(None)), transformers_model()
    prompts = [tokenizer.encode(prompt) for prompt in CANDIDATES]
    cases = []
    for text, prompt, answer in zip(CANDIDATES, prompts, propose_answers(model, prompts), strict=True):
        margin = smallest_margin(model, prompt, answer)
        print(f"{margin:.5f} {text!r}", flush=True)
        if margin > MARGIN and len(cases) < 20:
            cases.append({"prompt": text, "prompt_token_ids": prompt, "token_ids": answer})
    assert len(cases) == 20, f"only {len(cases)} prompts have margins above {MARGIN}"
    rows = ",\n".join(json.dumps(case) for case in cases)
    GREEDY_TOKENS.write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
