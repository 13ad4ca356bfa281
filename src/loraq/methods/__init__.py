"""One weight in, one `LayerSolution` out: the methods and their names."""

from loraq.methods.base import Method, layer_seed
from loraq.methods.gptq import GPTQ
from loraq.methods.loraq import EFFORTS, LoRaQ
from loraq.methods.lqer import LQER
from loraq.methods.qera import QERA
from loraq.methods.rtn import RTN
from loraq.methods.svdquant import SVDQuant

__all__ = ["EFFORTS", "GPTQ", "LQER", "QERA", "RTN", "LoRaQ", "Method", "SVDQuant", "layer_seed"]
