"""Methods: what is measured of a tensor, and the coefficients that follow from it."""

from streamsoup.methods.linear import Linear, linear
from streamsoup.methods.protocol import Coefficients, Method

__all__ = ["Coefficients", "Linear", "Method", "linear"]
