"""One weight in, one `LayerSolution` out: the methods and their names."""

from loraq.methods.base import METHODS, Method, layer_seed, register
from loraq.methods.fits import Fit
from loraq.methods.gptq import GPTQ
from loraq.methods.loraq import EFFORTS, LoRaQ
from loraq.methods.qera import LQER, QERA
from loraq.methods.rtn import RTN
from loraq.methods.svdquant import SVDQuant

__all__ = [
    "EFFORTS",
    "GPTQ",
    "LQER",
    "METHODS",
    "QERA",
    "RTN",
    "Fit",
    "LoRaQ",
    "Method",
    "SVDQuant",
    "layer_seed",
    "register",
]
