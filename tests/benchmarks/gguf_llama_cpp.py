"""Our GGUF files in llama.cpp: the same tokens from a text, and the same greedy tokens after it, for each family.

    python tests/benchmarks/gguf_llama_cpp.py [--llama_cpp_python PYTHON] [--tokens 32] [--only WORD]

PYTHON (or the environment variable LLAMA_CPP_PYTHON) is a Python that has the package llama-cpp-python:

    python -m venv llamacpp && llamacpp/bin/pip install llama-cpp-python

Each model is tiny and random, with a tokenizer trained here, and is longer in use than its windows and its original
context. Bar: the text gives the same token ids, and all greedy tokens after it are equal in f16; bf16 and q8_0 load and
give logits near ours. The last column is the largest difference of logits, as a share of the largest logit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TEXT = "The quick brown fox can't jump over 12345 lazy dogs:\n\n    return a + b  # Straße, 日本語 🦙\n"
N_CTX = 256
MARGIN = 0.004  # by how much the likeliest token leads at least, as a share of the largest logit
ORIGINAL = 32  # original context of the models with scaled RoPE, shorter than what is fed


def families() -> list[tuple[str, str, str, Any]]:
    """Name, HF model type, tokenizer and config of each model."""
    from litgpt import config

    sizes = dict(n_layer=3, n_embd=64, n_head=4, n_query_groups=2, intermediate_size=96, block_size=N_CTX)
    sizes |= dict(vocab_size=512, padded_vocab_size=544, norm_eps=1e-5)
    llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=ORIGINAL)
    yarn = dict(factor=4.0, beta_fast=32.0, beta_slow=1.0, original_max_seq_len=ORIGINAL)

    def longrope(n: int, original: int) -> dict:
        factors = dict(short_factor=[1 + 0.1 * i for i in range(n)], long_factor=[1.0 + i for i in range(n)])
        return factors | dict(factor=N_CTX / original, original_max_seq_len=original)

    windows = sizes | dict(sliding_window_size=16, head_size=32)
    return [
        ("Llama 2", "llama", "json", config.LlamaConfig(**sizes | dict(n_query_groups=4))),
        ("Llama 3.1", "llama", "llama3", config.LlamaConfig(**sizes, rope_base=500000, rope_adjustments=llama3)),
        ("Llama 3.2", "llama", "llama3", config.LlamaConfig(**sizes, rope_adjustments=llama3, tie_embeddings=True)),
        ("Llama 2 32K", "llama", "json", config.LlamaConfig(**sizes, rope_condense_ratio=8)),
        ("SmolLM2", "llama", "smollm", config.LlamaConfig(**sizes, tie_embeddings=True)),
        ("Mistral", "mistral", "sentencepiece", config.MistralConfig(**sizes)),
        ("Mistral Nemo", "mistral", "tekken", config.MistralConfig(**sizes, head_size=32)),
        ("Mistral YaRN", "mistral", "sentencepiece", config.MistralConfig(**sizes, rope_adjustments=yarn)),
        ("Qwen2.5", "qwen2", "qwen2", config.QwenConfig(**sizes)),
        ("Qwen2.5 YaRN", "qwen2", "qwen2", config.QwenConfig(**sizes, rope_adjustments=yarn, tie_embeddings=True)),
        ("Qwen3", "qwen3", "qwen2", config.Qwen3Config(**sizes, head_size=32)),
        ("Gemma", "gemma", "gemma", config.GemmaConfig(**sizes, head_size=32)),
        ("Gemma 2", "gemma2", "gemma", config.Gemma2Config(**windows)),
        ("Gemma 3", "gemma3_text", "gemma",
         config.Gemma3Config(**windows | dict(n_layer=7), rope_adjustments={"factor": 8.0})),
        ("Phi-3", "phi3", "gpt-2", config.LlamaConfig(**sizes)),
        ("Phi-3 128K", "phi3", "json", config.LlamaConfig(**sizes, rope_adjustments=longrope(8, ORIGINAL))),
        ("Phi-3 128K, short", "phi3", "dbrx", config.LlamaConfig(**sizes, rope_adjustments=longrope(8, N_CTX))),
        ("Phi-4-mini", "phi3", "gpt-4o", config.LlamaConfig(
            **sizes, tie_embeddings=True, rotary_percentage=0.75, rope_adjustments=longrope(6, ORIGINAL))),
    ]  # fmt: skip


def train_tokenizer(kind: str, folder: Path) -> None:
    """A tokenizer of 512 tokens in `folder`, built as the models of that kind have it."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as HFTokenizer

    from litgpt.checkpoint import gguf_tokenizer

    folder.mkdir(parents=True)
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))] + [TEXT] * 3
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    if kind == "sentencepiece":
        import sentencepiece

        (folder / "texts").write_text("\n".join(texts), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "texts"), model_prefix=str(folder / "tokenizer"), vocab_size=512, model_type="bpe",
            byte_fallback=True, split_digits=True, character_coverage=0.99, normalization_rule_name="identity",
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
        )  # fmt: skip
        config |= {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return
    specials = ["<unk>", "<s>", "</s>"]
    if kind in ("json", "gemma"):
        space = gguf_tokenizer.SPACE
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        processor = HFTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        steps = [normalizers.Prepend(space)] if kind == "json" else []
        processor.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", space)])
        processor.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
        # whole lines are no words: merges are learnt within them
        processor.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{space}?[^{space}\n]+|[{space}\n]"), "isolated")
        trainer = trainers.BpeTrainer(
            vocab_size=512, special_tokens=specials + byte_tokens, limit_alphabet=70, show_progress=False
        )
        processor.train_from_iterator(texts, trainer)
        processor.pre_tokenizer = None
        content = json.loads(processor.to_str())
        content["added_tokens"] = content["added_tokens"][: len(specials)]  # bytes are ordinary tokens
        processor = HFTokenizer.from_str(json.dumps(content))
        config |= {"unk_token": "<unk>", "add_bos_token": True}
    else:
        names = {name: patterns for patterns, name in gguf_tokenizer._PRE_TOKENIZERS.items()}
        names["llama3"] = (gguf_tokenizer._BY_THREE_DIGITS,)
        processor = HFTokenizer(models.BPE(ignore_merges=kind in ("llama3", "tekken")))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in names[kind]]
        splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        processor.pre_tokenizer = pre_tokenizers.Sequence(splits)
        processor.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=512, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
        processor.train_from_iterator(texts, trainer)
        config["add_bos_token"] = kind == "llama3"
    bos = [("<s>", processor.token_to_id("<s>"))]
    processor.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", bos)
    processor.save(str(folder / "tokenizer.json"))
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def export(folder: Path, only: str, n_new: int) -> tuple[list[dict], list[dict]]:
    """Write the models; what llama.cpp shall do with them, and what comes out of ours."""
    import torch

    from litgpt.checkpoint.gguf import write_gguf
    from litgpt.checkpoint.lazy import LazyTensor
    from litgpt.model import GPT
    from litgpt.tokenizer import Tokenizer

    jobs, ours = [], []
    for name, model_type, kind, config in families():
        if only.lower() not in name.lower():
            continue
        config.name = name
        tokenizer_dir = folder / f"tokenizer-{kind}"
        if not tokenizer_dir.exists():
            train_tokenizer(kind, tokenizer_dir)
        idx = Tokenizer(tokenizer_dir).encode(TEXT).long()
        model = decided_model(config, idx, n_new)
        weights = {key: LazyTensor.of(value) for key, value in model.state_dict().items()}
        if config.tie_embeddings:
            weights.pop("lm_head.weight")
        for gguf_type, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16), ("q8_0", torch.float16)):
            path = folder / f"{name.replace(' ', '-')}-{gguf_type}.gguf"
            write_gguf(path, weights, config, model_type, tokenizer_dir, gguf_type)
            jobs.append(dict(path=str(path), text=TEXT, tokens=idx.tolist(), n_new=n_new, n_ctx=N_CTX))
            rounded = {k: v.to(dtype).float() if v.dim() > 1 else v for k, v in model.state_dict().items()}
            twin = GPT(config).eval()
            twin.load_state_dict(rounded)
            ours.append(dict(name=name, type=gguf_type, tokenizer=kind, **greedy(twin, idx, n_new)))
    return jobs, ours


def decided_model(config: Any, idx: Any, n_new: int) -> Any:
    """The first random model that does not repeat itself and is never in doubt about a token: llama.cpp rounds
    activations to f16, so that of two tokens with the same logit either may win."""
    import torch

    from litgpt.model import GPT

    for seed in range(1000):
        torch.manual_seed(seed)
        model = GPT(config).eval()
        for name, parameter in model.named_parameters():
            shift = 0.0 if config.norm_unit_offset or parameter.dim() > 1 or "bias" in name else 1.0
            std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            if parameter is model.transformer.wte.weight and config.scale_embeddings:  # or the input alone would decide
                std /= config.n_embd**0.5
            torch.nn.init.normal_(parameter, shift, std)
        found = greedy(model, idx, n_new)
        if found["margin"] > MARGIN and len(set(found["tokens"])) > n_new // 4:
            return model
    raise RuntimeError(f"{config.name}: no model out of 1000 is decided")


def greedy(model: Any, idx: Any, n_new: int) -> dict[str, Any]:
    """Our tokens, the logits at each position of the prompt, and by how much the likeliest token leads at least."""
    import torch

    with torch.inference_mode():
        model.set_kv_cache(1, max_seq_length=N_CTX)
        logits = model(idx.unsqueeze(0), torch.arange(len(idx)))[0]
        tokens, last, leads = [], logits[-1], []
        while len(tokens) < n_new:
            (first, second), ids = last.topk(2)
            leads.append(float((first - second) / last.abs().max()))
            tokens.append(int(ids[0]))
            last = model(torch.tensor([tokens[-1:]]), torch.tensor([len(idx) + len(tokens) - 1]))[0, -1]
    return dict(tokens=tokens, logits=logits.tolist(), margin=min(leads))


def work(jobs_path: Path) -> None:
    """What runs in the other Python: load each file with llama.cpp, tokenise, feed, and take the likeliest tokens."""
    import numpy as np
    from llama_cpp import Llama

    results = []
    for job in json.loads(jobs_path.read_text(encoding="utf-8")):
        try:
            llama = Llama(job["path"], n_ctx=job["n_ctx"], logits_all=True, swa_full=False, verbose=False, n_threads=1)
        except Exception as error:
            results.append(dict(error=str(error)))
            continue
        ids = llama.tokenize(job["text"].encode(), add_bos=True, special=False)
        llama.eval(job["tokens"])
        logits = np.array(llama.scores[: len(job["tokens"])])
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < job["n_new"]:
            llama.eval(tokens[-1:])
            tokens.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        text = llama.detokenize(ids[1:]).decode(errors="replace")
        template = llama.metadata.get("tokenizer.chat_template", "")
        results.append(dict(ids=ids, tokens=tokens, logits=logits.tolist(), text=text, has_template=bool(template)))
        llama.close()
    jobs_path.with_name("results.json").write_text(json.dumps(results), encoding="utf-8")


def main() -> int:
    """Exit status 0 if all that must hold does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama_cpp_python", default=os.environ.get("LLAMA_CPP_PYTHON"))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--only", default="")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return 0
    if not args.llama_cpp_python:
        parser.error("name a Python that has llama-cpp-python: --llama_cpp_python or LLAMA_CPP_PYTHON")
    with tempfile.TemporaryDirectory() as folder:
        jobs, ours = export(Path(folder), args.only, args.tokens)
        (Path(folder) / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        subprocess.run([args.llama_cpp_python, __file__, "--work", f"{folder}/jobs.json"], check=True)
        theirs = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    is_good = True
    print(f"{'model':18} {'type':5} {'tokenizer':14} {'text ids':9} {'greedy':8} largest difference of logits")
    for job, mine, other in zip(jobs, ours, theirs):
        start = f"{mine['name']:18} {mine['type']:5} {mine['tokenizer']:14}"
        if "error" in other:
            is_good = False
            print(f"{start} does not load: {other['error']}")
            continue
        same_ids = other["ids"] == job["tokens"]
        n_equal = next((i for i, (a, b) in enumerate(zip(mine["tokens"], other["tokens"])) if a != b), args.tokens)
        most = max(abs(v) for row in mine["logits"] for v in row)
        rows = zip(mine["logits"], other["logits"])
        difference = max(abs(a - b) for x, y in rows for a, b in zip(x, y)) / most
        limit = {"f16": 5e-3, "bf16": 3e-2, "q8_0": 0.2}[mine["type"]]
        holds = same_ids and other["has_template"] and difference < limit
        holds &= n_equal == args.tokens or mine["type"] != "f16"
        is_good &= holds
        count = f"{n_equal}/{args.tokens}"
        print(f"{start} {'same' if same_ids else 'differ':9} {count:8} {difference:.1e} {'' if holds else '  FAILS'}")
        if not same_ids:
            print("  ours  ", job["tokens"][:60], "\n  theirs", other["ids"][:60])
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
