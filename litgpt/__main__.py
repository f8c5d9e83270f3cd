"""The command `litgpt`: one table of commands. Only the command asked for is imported."""

import importlib
import os
import sys
import traceback
import warnings

from litgpt.command_help import error_text, format_commands
from litgpt.command_line import take_common_flags
from litgpt.parameters import UsageError, did_you_mean

COMMANDS = {
    "Data and tokenizer": {
        "download": ("litgpt.scripts.download:download_from_hub", "get weights or a tokenizer from Hugging Face"),
        "upload": ("litgpt.scripts.upload:setup", "upload a model to the Hugging Face hub"),
        "train_tokenizer": ("litgpt.scripts.train_tokenizer:setup", "train a byte-level BPE tokenizer on your text"),
    },
    "Train": {
        "pretrain": ("litgpt.pretrain:setup", "train a model from scratch, or go on training one"),
        "finetune": ("litgpt.finetune.lora:setup", "the same as finetune_lora"),
        "finetune_lora": ("litgpt.finetune.lora:setup", "finetune with low-rank adapters"),
        "finetune_full": ("litgpt.finetune.full:setup", "finetune all weights"),
        "finetune_adapter": ("litgpt.finetune.adapter:setup", "finetune with adaption prompts"),
        "finetune_adapter_v2": ("litgpt.finetune.adapter_v2:setup", "finetune with prompts, scales and biases"),
        "finetune_dpo": ("litgpt.finetune.dpo:setup", "tune on preferences: DPO, IPO, ORPO, SimPO or KTO"),
        "report": ("", "curves and tables of runs"),
    },
    "Use": {
        "generate": ("litgpt.generate.base:main", "generate text from a prompt"),
        "generate_full": ("litgpt.generate.full:main", "generate with a fully finetuned model"),
        "generate_adapter": ("litgpt.generate.adapter:main", "generate with an adapter"),
        "generate_adapter_v2": ("litgpt.generate.adapter_v2:main", "generate with an adapter v2"),
        "generate_sequentially": ("", "generate with the layers spread over several devices"),
        "generate_speculatively": ("", "generate with the help of a smaller draft model"),
        "generate_tp": ("", "generate with each layer split over several devices"),
        "chat": ("", "chat with a model in the terminal"),
        "evaluate": ("", "run benchmark tasks"),
        "serve": ("", "serve a model over HTTP"),
    },
    "Checkpoints": {
        "models": ("litgpt.scripts.models:setup", "list the models that are known by name"),
        "plan": ("litgpt.scripts.plan:setup", "parameters, FLOPs and memory of a run before it starts"),
        "validate": ("litgpt.scripts.validate:validate_setup", "check a checkpoint folder"),
        "merge_lora": ("litgpt.scripts.merge_lora:merge_lora", "merge LoRA weights into the base model"),
        "convert_to_litgpt": ("litgpt.scripts.convert_hf_checkpoint:convert_hf_checkpoint", "import from Hugging Face"),
        "convert_from_litgpt": (
            "litgpt.scripts.convert_lit_checkpoint:convert_lit_checkpoint",
            "export to Hugging Face's format or GGUF",
        ),
        "convert_pretrained_checkpoint": (
            "litgpt.scripts.convert_pretrained_checkpoint:convert_pretrained_checkpoint",
            "strip a pretraining checkpoint down to its weights",
        ),
    },
    "Extend": {
        "quickstart": ("litgpt.quickstart:setup", "tokenizer, pretraining, generation and a loss plot in four minutes"),
        "new": ("", "write the file and the test of a model of your own"),
        "configure": ("", "write a whole run as commented YAML"),
        "check": ("", "run the contract tests on a model of your own"),
    },
}
"""Group -> command -> (module:function, what it does). A command without a function comes in a later version."""

ROWS = {name: row for group in COMMANDS.values() for name, row in group.items()}


def main(argv: list[str] | None = None) -> None:
    """Run one command line. Exit status: 0 done, 1 failed, 2 not understood, 130 interrupted."""
    prog, debug, format_warning = "litgpt", bool(os.environ.get("LITGPT_DEBUG")), warnings.formatwarning
    try:
        words, extensions, wants_debug = take_common_flags(list(sys.argv[1:] if argv is None else argv))
        debug |= wants_debug
        prog = f"litgpt {words[0]}" if words and words[0] in ROWS else prog
        warnings.formatwarning = lambda message, *_: f"{prog}: warning: {message}\n"
        _run(words, extensions)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"{prog}: error: {error_text(error)}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    finally:
        warnings.formatwarning = format_warning


def _run(words: list[str], extensions: list[str]) -> None:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("-h", "--help"):
        print(format_commands(COMMANDS))
    elif command == "--version":
        print(f"litgpt {importlib.import_module('litgpt').__version__}")
    elif command not in ROWS:
        raise UsageError(f"unknown command {command!r}{did_you_mean(command, ROWS)} `litgpt --help` lists all.")
    elif not ROWS[command][0]:
        today = ", ".join(name for name, (target, _) in ROWS.items() if target)
        print(f"litgpt {command}: not in this version yet; what works today: {today}.", file=sys.stderr)
        raise SystemExit(1)
    else:
        for extension in extensions:
            importlib.import_module("litgpt.registry").load_extension(extension)
        module, _, name = ROWS[command][0].partition(":")
        function = getattr(importlib.import_module(module), name)
        parser = importlib.import_module("litgpt.parser_config")
        get_data = lambda name: importlib.import_module("litgpt.registry").get_data(name)  # noqa: E731
        parser.run_command(function, rest, f"litgpt {command}", registered=get_data)


if __name__ == "__main__":
    main()
