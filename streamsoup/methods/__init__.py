"""Methods: what is measured of a tensor, and how it is combined then."""

from streamsoup.methods.linear import Linear, linear
from streamsoup.methods.protocol import Coefficients, Method

__all__ = ["Coefficients", "Linear", "Method", "linear"]
