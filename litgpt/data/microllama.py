"""The data that MicroLlama was trained on."""

from dataclasses import dataclass, field

from litgpt.data.tinyllama import TinyLlama


@dataclass
class MicroLlama(TinyLlama):
    """SlimPajama alone, as `litgpt.data.prepare_slimpajama` writes it."""

    use_starcoder: bool = field(default=False, init=False)
