"""`LLM`: a model, its tokenizer and its prompt style as one Python object.

Letters in shapes: B batch, T tokens, V vocabulary.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from shutil import copyfile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from litgpt.benchmark import benchmark_dict_to_markdown_table, measure
from litgpt.checkpoint.atomic import atomic_folder
from litgpt.checkpoint.export import TOKENIZER_FILES
from litgpt.checkpoint.folders import WEIGHTS_NAME
from litgpt.checkpoint.hub import find_checkpoint
from litgpt.checkpoint.io import load_torch, save_torch
from litgpt.config import Config, find_multiple, rope_kind, save_config
from litgpt.generate.base import generate_fn, own_predict
from litgpt.generate.decoding import Decoder, check_lengths
from litgpt.generate.loading import autocast, find_device, load_model, parse_precision
from litgpt.hardware import calculate_number_of_devices
from litgpt.losses import chunked_cross_entropy
from litgpt.prompts import Default, PromptStyle, has_prompt_style, load_prompt_style, save_prompt_style
from litgpt.registry import ModelSpec, build_model, get_model_spec, load_checkpoint_config, resolve_model
from litgpt.tokenizer import MissingTokenizerError, Tokenizer

__all__ = [
    "LLM", "Preprocessor", "benchmark_dict_to_markdown_table", "calculate_number_of_devices",
    "pull_request_benchmark_util",
]  # fmt: skip

_CACHE_STEP_TOKENS = 256
"""A KV cache grows in such steps, so that a slightly longer prompt finds it large enough."""
_NO_MODEL = "there is no model yet: call .distribute() or .trainer_setup() first"


class Preprocessor:
    """Text to token ids on a device, and back."""

    def __init__(self, tokenizer: Tokenizer, device: str | torch.device = "cpu") -> None:
        self.tokenizer = tokenizer
        self.device = device

    def encode(self, text: str) -> Tensor:
        """Token ids `(T,)`, int32."""
        return self.tokenizer.encode(text, device=self.device)

    def decode(self, token_ids: Tensor) -> str:
        """Text of token ids in any shape; special tokens give nothing."""
        return self.tokenizer.decode(token_ids)


class LLM(nn.Module):
    """A model that takes and gives text, and is a module to train: `llm = LLM.load("microsoft/phi-2")`.

    Attributes:
        model: The model itself; None before `distribute` or `trainer_setup` where `load` was told to wait.
        config, spec: What the model is.
        preprocessor, prompt_style: Around the model: tokenizer, and how a prompt is dressed.
        checkpoint_dir: Where it came from; None for random weights.
        kv_cache_initialized, fixed_kv_cache_size, prev_generated_seq_length: State of the KV cache.
    """

    def __init__(
        self,
        model: nn.Module | None,
        preprocessor: Preprocessor | None = None,
        prompt_style: PromptStyle | None = None,
        devices: int | list[int] | None = None,
        config: Config | None = None,
        checkpoint_dir: Path | None = None,
        fabric: Any = None,
        generate_strategy: Literal["sequential", "tensor_parallel"] | None = None,
        kv_cache_initialized: bool = False,
        fixed_kv_cache_size: int | Literal["max_model_supported"] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocessor = preprocessor
        self.devices = devices
        self.config = config if config is not None else getattr(model, "config", None)
        self.prompt_style = prompt_style or (PromptStyle.from_config(self.config) if self.config else Default())
        self.checkpoint_dir = checkpoint_dir
        self.generate_strategy = generate_strategy
        self.kv_cache_initialized = kv_cache_initialized
        self.fixed_kv_cache_size = fixed_kv_cache_size
        self.prev_generated_seq_length = 0
        self.spec: ModelSpec = get_model_spec(getattr(self.config, "model_type", "gpt"))
        self._fabric, self._tokenizer_dir, self._n_cached = fabric, checkpoint_dir, 0
        self._autocast_dtype: torch.dtype | None = None

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def load(
        cls,
        model: str | Path,
        init: Literal["pretrained", "random"] | None = "pretrained",
        tokenizer_dir: Path | None = None,
        access_token: str | None = None,
        distribute: Literal["auto"] | None = "auto",
    ) -> "LLM":
        """A model by name, ready for use on one device.

        Args:
            model: A litgpt or Hugging Face folder, a name that `litgpt models` lists or an ORG/NAME on the Hugging Face
                hub (both are downloaded where they are not below `checkpoints/` yet), or a registered model of yours.
            init: "pretrained" loads weights, "random" draws new ones for the model called `model`.
            tokenizer_dir: Folder with the tokenizer; default: the one of the weights.
            access_token: For gated repos of the hub.
            distribute: "auto" puts the model on the best device in its usual precision; None leaves that to a later
                `distribute()` or `trainer_setup()`, and loads no weights yet.

        Raises:
            ValueError, FileNotFoundError: There is no such model, or no tokenizer where one is needed.
        """
        if distribute not in ("auto", None):
            raise ValueError(f'distribute is {distribute!r}: choose "auto" or None')
        if init == "random":
            if tokenizer_dir is None:
                raise ValueError('init="random" needs tokenizer_dir, the folder of the tokenizer to use')
            checkpoint_dir, config = None, resolve_model(str(model))[1]
            style = PromptStyle.from_config(config)
        elif init == "pretrained":
            checkpoint_dir = find_checkpoint(model, access_token=access_token)
            config = load_checkpoint_config(checkpoint_dir)[1]
            has_style = has_prompt_style(checkpoint_dir)
            style = load_prompt_style(checkpoint_dir) if has_style else PromptStyle.from_config(config)
        else:
            raise ValueError(f'init is {init!r}: choose "pretrained" or "random"')
        try:
            preprocessor = Preprocessor(Tokenizer(tokenizer_dir or checkpoint_dir))
        except MissingTokenizerError:
            if tokenizer_dir is not None:
                raise
            preprocessor = None  # the model takes and gives ids
        llm = cls(None, preprocessor, style, config=config, checkpoint_dir=checkpoint_dir)
        llm._tokenizer_dir = tokenizer_dir or checkpoint_dir
        if distribute == "auto":
            llm.distribute()
        return llm

    def distribute(
        self,
        accelerator: Literal["cpu", "gpu", "cuda", "mps", "auto"] = "auto",
        devices: int | list[int] | Literal["auto"] = "auto",
        precision: str | None = None,
        quantize: Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"] | None = None,
        generate_strategy: Literal["sequential", "tensor_parallel"] | None = None,
        fixed_kv_cache_size: int | Literal["max_model_supported"] | None = None,
    ) -> None:
        """Put the model on a device; weights that are not loaded yet are loaded, others move as they are.

        Args:
            accelerator: cpu, gpu, cuda, mps, or auto: CUDA, else MPS, else the CPU.
            devices: How many, or which CUDA device as a list of one; several are not in this version yet.
            precision: 32-true, bf16-true, 16-true, bf16-mixed, 16-mixed or 64-true. Default: bf16-true where there is
                bf16.
            quantize: Not in this version yet.
            generate_strategy: Not in this version yet.
            fixed_kv_cache_size: Tokens that the KV cache holds from the start, or "max_model_supported"; default: it
                grows with what is generated.
        """
        for name, value in (("quantize", quantize), ("generate_strategy", generate_strategy)):
            if value is not None:
                raise NotImplementedError(f"{name}={value!r} is not in this version yet: leave it out")
        device = find_device(accelerator, devices)
        dtype, self._autocast_dtype = parse_precision(precision)
        if self.model is None:
            self.model = self._build(device, dtype)
        else:
            self.model = self.model.to(device=device, dtype=dtype)
        self.devices, self._fabric = 1, None
        if self.preprocessor is not None:
            self.preprocessor.device = device
        self.fixed_kv_cache_size, self.kv_cache_initialized, self._n_cached = fixed_kv_cache_size, False, 0
        if fixed_kv_cache_size is not None:
            limit = self.config.block_size
            size = limit if fixed_kv_cache_size == "max_model_supported" else int(fixed_kv_cache_size)
            if not 1 <= size <= limit:
                raise ValueError(f"fixed_kv_cache_size is {size}; this model takes 1 to {limit} tokens")
            self._set_kv_cache(size)
        print(f"Using {device}, {str(dtype).removeprefix('torch.')} weights", file=sys.stderr)

    def _build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        if self.checkpoint_dir is not None:
            return load_model(self.spec, self.config, self.checkpoint_dir, device, dtype)
        model = build_model(self.spec, self.config)
        if hasattr(model, "init_weights"):
            model.init_weights()
        return model.to(device=device, dtype=dtype).eval()

    def trainer_setup(self, trainer_ckpt: Path | None = None) -> None:
        """Build the model for the Trainer of PyTorch Lightning, in float32 on the CPU; the Trainer moves it.

        Args:
            trainer_ckpt: A checkpoint of the Trainer to take the weights from; default: those of the checkpoint folder,
                or new ones for a random model.

        Raises:
            ValueError: The weights do not fit the model; missing ones are never left at random.
        """
        if trainer_ckpt is None:
            self.model = self._build(torch.device("cpu"), torch.float32).train()
            return
        state = load_torch(trainer_ckpt)
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        model = build_model(self.spec, self.config)
        names = sorted(model.state_dict(), key=len, reverse=True)[:1]
        prefix = next((key[: -len(names[0])] for key in state if key.endswith(names[0])), None)
        if prefix is None:
            raise ValueError(
                f"{trainer_ckpt} is no checkpoint of a Trainer for {self.config.name}: it lacks {names[0]}"
            )
        weights = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{trainer_ckpt} does not fit the model: {' '.join(str(error).split())}") from None
        self.model = model.train()

    def save(self, out_dir: Path | str | None = None, prompt_style: PromptStyle | str | None = None) -> None:
        """Write a checkpoint folder that every command reads: weights, configs, tokenizer, the prompt style in use.

        Args:
            out_dir: Made if it is not there. In an existing folder each file is replaced when it is complete.
            prompt_style: Instead of the one in use.
        """
        if out_dir is None:
            raise ValueError('save needs a folder: llm.save("out/my_model")')
        self._need_model()
        out_dir = Path(out_dir)
        if not out_dir.exists() or not any(out_dir.iterdir()):
            with atomic_folder(out_dir) as folder:
                self._save_into(folder, prompt_style)
        else:
            self._save_into(out_dir, prompt_style)

    def _save_into(self, folder: Path, prompt_style: PromptStyle | str | None) -> None:
        sources = dict.fromkeys((*TOKENIZER_FILES, "generation_config.json"), self._tokenizer_dir)
        sources["config.json"] = self.checkpoint_dir  # the one beside a tokenizer may be of another model
        for name, source_dir in sources.items():
            source = Path(source_dir or "", name)
            if source_dir and source.is_file() and source.resolve() != (folder / name).resolve():
                copyfile(source, folder / name)
        save_config(self.config, folder)
        save_prompt_style(prompt_style or self.prompt_style, folder)
        save_torch(self.state_dict(), folder / WEIGHTS_NAME)

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """That of the model, without a `model.` in front of the names."""
        return self._need_model().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Into the model; names as `state_dict` gives them."""
        return self._need_model().load_state_dict(state_dict, strict=strict, assign=assign)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the preprocessor."""
        if self.preprocessor is None:
            # no AttributeError: nn.Module would replace its message
            raise MissingTokenizerError(f"{self.checkpoint_dir} holds no tokenizer: load it with tokenizer_dir=FOLDER")
        return self.preprocessor.tokenizer

    @property
    def fabric(self) -> Any:
        """A Lightning Fabric on the model's device, for scripts that use it; made when it is first asked for."""
        if self._fabric is None:
            from lightning.fabric import Fabric

            self._fabric = Fabric(accelerator=self.device.type, devices=1)
        return self._fabric

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        if self.model is None:
            raise RuntimeError(_NO_MODEL)
        return next(self.model.parameters()).device

    def _need_model(self) -> nn.Module:
        if self.model is None:
            raise AttributeError(_NO_MODEL)
        return self.model

    # ---------------------------------------------------------------- use

    def forward(
        self,
        input_ids: Tensor,
        target_ids: Tensor | None = None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits `(B, T, V)`, and with targets the loss too.

        Args:
            input_ids: `(B, T)`.
            target_ids: `(B, T)`, not shifted: position t is the target of position t - 1; -100 is ignored.
            loss_fn: Takes logits `(B, T - 1, V)` and targets `(B, T - 1)`; default: mean cross-entropy.
        """
        with autocast(input_ids.device, self._autocast_dtype):
            logits = self._need_model()(input_ids)
            if target_ids is None:
                return logits
            return logits, (loss_fn or chunked_cross_entropy)(logits[..., :-1, :], target_ids[..., 1:])

    def generate(
        self,
        prompt: str | list[dict[str, str]] | Tensor,
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        min_p: float = 0.0,
        rng: torch.Generator | None = None,
    ) -> str | Tensor | Iterator[str] | Iterator[Tensor]:
        """What the model adds to a prompt, up to its end of turn, which is not returned.

        Args:
            prompt: Text, dressed by the prompt style; messages, for the styles that take them; or token ids `(T,)`,
                which are fed as they are.
            sys_prompt: System prompt, for prompt styles that have one.
            max_new_tokens: Length of the answer at most.
            temperature: See `Sampler`, also for `top_k`, `top_p` and `min_p`; 0 always takes the most likely token.
            return_as_token_ids: Return ids `(n,)` instead of text.
            stream: Return an iterator over pieces of text, or over ids `(1,)`, as soon as they are certain.
            rng: Generator on the model's device to draw from; None: the global one.

        Raises:
            ValueError: The prompt and the answer do not fit into the model's context, or a setting is out of range.
        """
        model = self._need_model()
        if isinstance(prompt, Tensor):
            idx = prompt.reshape(-1).to(self.device).long()
        else:
            idx = self.tokenizer.encode(self.prompt_style.apply(prompt, sys_prompt=sys_prompt)).to(self.device).long()
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens} is below 1: there would be nothing to generate")
        sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, rng=rng)
        tokens = self._tokens(model, idx, max_new_tokens, sampling)
        if not return_as_token_ids:
            self.tokenizer  # noqa: B018  says at once that there is none
        if stream:
            return tokens if return_as_token_ids else self.tokenizer.decode_stream(tokens)
        ids = torch.cat([idx.new_empty(0), *tokens])
        return ids if return_as_token_ids else self.tokenizer.decode(ids)

    def _tokens(self, model: nn.Module, idx: Tensor, max_new_tokens: int, sampling: dict[str, Any]) -> Iterator[Tensor]:
        """The new tokens, one at a time; nothing is computed before the first is asked for."""
        max_returned_tokens = len(idx) + max_new_tokens
        predict = own_predict(self.spec)
        if predict is not None:
            eos_id = self.preprocessor.tokenizer.eos_id if self.preprocessor else None
            tokens = predict(model, idx, max_new_tokens=max_new_tokens, **sampling, eos_id=eos_id)
        else:
            if hasattr(model, "set_kv_cache"):
                self._fit_kv_cache(len(idx), max_returned_tokens)
            check_lengths(model, len(idx), max_returned_tokens)
            stops = self.prompt_style.stop_tokens(self.tokenizer) if self.preprocessor else ()
            tokens = generate_fn(
                model, idx, max_returned_tokens, **sampling, stop_tokens=stops, include_prompt=True, include_eos=False,
                decoder=Decoder(model),
            )  # fmt: skip
        self.prev_generated_seq_length = max_returned_tokens
        return self._run(model, tokens)

    def _run(self, model: nn.Module, tokens: Iterator[Tensor]) -> Iterator[Tensor]:
        was_training = model.training
        model.eval()
        try:
            is_prompt = True
            while True:
                with autocast(self.device, self._autocast_dtype):  # not around the yield: it would reach the caller
                    token = next(tokens, None)
                if token is None:
                    return
                if not is_prompt:
                    yield token
                is_prompt = False
        finally:
            model.train(was_training)

    def _fit_kv_cache(self, n_prompt: int, max_returned_tokens: int) -> None:
        """Make the cache long enough. It never shrinks, but where LongRoPE has other frequencies for short texts."""
        needed, limit = max_returned_tokens - 1, self.config.block_size
        if rope_kind(self.config.rope_adjustments) == "longrope":
            short = int(self.config.rope_adjustments["original_max_seq_len"])
            limit = short if needed <= short else limit
        if self.fixed_kv_cache_size is None and not needed <= self._n_cached <= limit and n_prompt and needed <= limit:
            self._set_kv_cache(min(find_multiple(needed, _CACHE_STEP_TOKENS), limit))

    def _set_kv_cache(self, n_tokens: int) -> None:
        self.model.set_kv_cache(batch_size=1, max_seq_length=n_tokens)
        self.kv_cache_initialized, self._n_cached = True, n_tokens

    def benchmark(self, num_iterations: int = 1, **kwargs: Any) -> tuple[str, dict[str, list[float]]]:
        """Generate a few times with the arguments `kwargs` of `generate`, and measure each time; see `measure`."""
        ids, figures = measure(self.generate, num_iterations, self.device, **kwargs)
        return self.tokenizer.decode(ids), figures


def pull_request_benchmark_util(model_name: str = "microsoft/phi-2", num_iterations: int = 6) -> None:
    """Print tables of speed for a pull request: a model on the best device, at once and streamed.

    The first of the iterations warms up and does not count.
    """
    llm = LLM.load(model_name)
    for stream in (False, True):
        prompt = "What do llamas eat?"
        _, figures = llm.benchmark(num_iterations, prompt=prompt, top_k=1, stream=stream)
        rest = {name: values[1:] or values for name, values in figures.items()}
        print(f"\n{model_name} on {llm.device}, torch {torch.__version__}, stream={stream}\n")
        print(benchmark_dict_to_markdown_table(rest))
