"""The loss by itself: it needs torch and numpy, nothing else.

`api` and `linear` hold the public functions, `options` every option once, `contract` what a backend gets and gives,
`backends` the backends, `registry` the choice among them, `ops` and `linear_ops` the operators, `linear_compute`,
`head` and `chunks` the loss through heads, `logits` 8-bit logits and heads and top-k lists, `adaptive` the weights of
teachers and languages over a training.
"""

from amtss_fast.loss.adaptive import AdaptiveStrategy
from amtss_fast.loss.api import AMTSSLoss, amtss_loss
from amtss_fast.loss.contract import AMTSSStats
from amtss_fast.loss.linear import linear_amtss_loss
from amtss_fast.loss.logits import (
    QuantizedLogits,
    QuantizedWeight,
    TopKLogprobs,
    quantize_logits,
    quantize_weight,
)
from amtss_fast.loss.options import LossOptions

__all__ = [
    "AMTSSLoss",
    "AMTSSStats",
    "AdaptiveStrategy",
    "LossOptions",
    "QuantizedLogits",
    "QuantizedWeight",
    "TopKLogprobs",
    "amtss_loss",
    "linear_amtss_loss",
    "quantize_logits",
    "quantize_weight",
]
