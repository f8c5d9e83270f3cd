import inspect
import json
import sys
from pathlib import Path

import pytest
from hub_server import running_hub

from litgpt.__main__ import main
from litgpt.scripts import download
from litgpt.scripts.download import download_from_hub, find_weight_files, gated_repo_catcher

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
FILES = {"config.json": json.dumps(LLAMA).encode(), "tokenizer.json": b"{}", "model.safetensors": bytes(1_500_000)}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub(monkeypatch, tmp_path) as hub:
        hub.add("org/model", FILES)
        yield hub


def fail(*argv: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 1


def test_command_ends_with_the_folder_and_what_to_run_next(hub, capsys):
    main(["download", "org/model"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        last == "Model in checkpoints/org/model (1.50MB). Next: litgpt generate checkpoints/org/model --prompt 'Hello'"
    )
    assert Path("checkpoints/org/model/model_config.yaml").is_file()


def test_flags_reach_the_download(hub, capsys):
    old = hub.repos["org/model"].branches["main"]
    hub.repos["org/model"].commit({"tokenizer.json": b'{"new": 1}'})
    main(["download", "org/model", "--tokenizer_only", "true", "--checkpoint_dir", "elsewhere", "--revision", old])
    assert capsys.readouterr().out.startswith("Tokenizer in elsewhere/org/model. Next: litgpt pretrain NAME")
    assert {path.name for path in Path("elsewhere/org/model").iterdir()} == {"config.json", "tokenizer.json"}
    assert Path("elsewhere/org/model/tokenizer.json").read_bytes() == b"{}"


def test_list_prints_org_and_name_of_all(capsys):
    main(["download", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == sorted(lines, key=str.lower) and len(lines) > 150
    assert "EleutherAI/pythia-14m" in lines


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["org/nothing"], "the hub has no model repo 'org/nothing'"),
        (["EleutherAI/pythia-14n"], "did you mean EleutherAI/pythia-14m"),
        (["../model"], "is no repo of the hub"),
        (["org/model", "--revision", "v9"], "has no revision 'v9'"),
        (["org/model", "--model_name", "pythia-14n"], "did you mean"),
        (["org/model", "--access_token", "hf_wrong"], "the hub refuses the access token"),
    ],
)
def test_failure_is_one_line_and_status_one(hub, capsys, argv, line):
    fail("download", *argv)
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and captured.err.startswith("litgpt download: error: ")
    assert line in captured.err and "hf_wrong" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("flags", "dtype"), [(["--convert_checkpoint", "true"], None), (["--dtype", "bfloat16"], "bfloat16")]
)
def test_conversion_is_asked_for_by_flag_or_by_dtype(hub, monkeypatch, flags, dtype):
    from litgpt.scripts import convert_hf_checkpoint

    calls = []
    monkeypatch.setattr(convert_hf_checkpoint, "convert_hf_checkpoint", lambda **arguments: calls.append(arguments))
    main(["download", "org/model"])
    assert not calls
    main(["download", "org/model", *flags])
    assert calls == [{"checkpoint_dir": Path("checkpoints/org/model"), "dtype": dtype}]


def test_converted_folder_holds_both_forms(hub, tmp_path):
    import torch
    from safetensors.torch import save

    width, inner, groups = 32, 64, 16
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (groups, width), "self_attn.v_proj": (groups, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    weights = {f"model.layers.{i}.{name}.weight": torch.randn(shape) for i in (0, 1) for name, shape in shapes.items()}
    weights |= {"model.embed_tokens.weight": torch.randn(300, width), "lm_head.weight": torch.randn(300, width)}
    weights["model.norm.weight"] = torch.randn(width)
    hub.repos["org/model"].commit({"model.safetensors": save(weights)})
    main(["download", "org/model", "--dtype", "bfloat16"])
    state = torch.load("checkpoints/org/model/lit_model.pth", weights_only=True)
    assert state["lm_head.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(state["lm_head.weight"], weights["lm_head.weight"].bfloat16())
    assert Path("checkpoints/org/model/model.safetensors").read_bytes() == save(weights)


def test_token_is_no_default_and_not_in_the_help(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert inspect.signature(download_from_hub).parameters["access_token"].default is None
    main(["download", "--help"])
    main(["download", "org/model", "--print_config"])
    assert "secret" not in "".join(capsys.readouterr())


def test_help_does_not_import_the_hub(tmp_path):
    import subprocess

    script = "import sys, litgpt.__main__ as m; m.main(['download', '--help']); print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_weight_files_of_a_repo_are_told_by_kind(hub):
    hub.repos["org/model"].commit(
        {"pytorch_model.bin": b"x", "training_args.bin": b"y", "consolidated.safetensors": b"z"}
    )
    assert find_weight_files("org/model", None) == (["pytorch_model.bin"], ["model.safetensors"])


def test_gated_repo_catcher_explains_what_the_library_raises(hub):
    from huggingface_hub import hf_hub_download

    hub.repos["org/model"].gated = True
    with (
        pytest.raises(ValueError, match="org/model is gated: ask for access at"),
        gated_repo_catcher("org/model", None),
    ):
        hf_hub_download("org/model", "config.json", local_dir="x", endpoint=hub.url)
    assert download.__doc__
