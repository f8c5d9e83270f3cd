from litgpt.checkpoint.io import load_weights
from litgpt.finetune import full


def test_full_finetuning_lowers_the_loss_and_leaves_a_checkpoint(settings, capsys):
    full.setup(**settings(train={"max_steps": 12}, eval={"final_validation": True, "initial_validation": True}))
    out = capsys.readouterr().out
    print(out)
    assert load_weights("out/final")
