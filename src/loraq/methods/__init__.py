"""One weight in, one `LayerSolution` out: the methods and their names."""

from loraq.methods.base import Method, layer_seed
from loraq.methods.loraq import EFFORTS, LoRaQ
from loraq.methods.lqer import LQER
from loraq.methods.rtn import RTN
from loraq.methods.svdquant import SVDQuant

__all__ = ["EFFORTS", "LQER", "RTN", "LoRaQ", "Method", "SVDQuant", "layer_seed"]
