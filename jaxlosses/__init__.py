"""Softmax cross-entropy for JAX: exact, loud about bad labels, drop-in for Optax."""

from jaxlosses import testing as testing
from jaxlosses._combine import Stats as Stats
from jaxlosses._cross_entropy import softmax_cross_entropy as softmax_cross_entropy
from jaxlosses._cross_entropy import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,  # noqa: E501
)
from jaxlosses._divergence import softmax_kl_divergence as softmax_kl_divergence
from jaxlosses._linear_cross_entropy import (
    linear_softmax_cross_entropy as linear_softmax_cross_entropy,
)
from jaxlosses._linear_divergence import (
    linear_softmax_kl_divergence as linear_softmax_kl_divergence,
)
from jaxlosses._linear_loss import linear_softmax_loss as linear_softmax_loss
from jaxlosses._linear_top_k_labels import (
    linear_softmax_cross_entropy_with_top_k_labels as linear_softmax_cross_entropy_with_top_k_labels,  # noqa: E501
)
from jaxlosses._log_probs import linear_softmax_log_probs as linear_softmax_log_probs
from jaxlosses._log_probs import softmax_entropy as softmax_entropy
from jaxlosses._log_probs import softmax_log_probs as softmax_log_probs
from jaxlosses._rows import Rows as Rows
from jaxlosses._softmax import log_softmax as log_softmax
from jaxlosses._softmax import softmax as softmax
from jaxlosses._top_k_labels import (
    softmax_cross_entropy_with_top_k_labels as softmax_cross_entropy_with_top_k_labels,
)

__version__ = "0.1.0"
