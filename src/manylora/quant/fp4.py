"""`fp4`: four bits a weight as a small floating-point number (sign, two bits of exponent, one of fraction).

Bytes as bitsandbytes writes them. Two codes stand for zero, so a dense weight packed again may take the other one; the
values do not change.
"""

from manylora.quant.four_bit import FourBitFormat

FP4 = FourBitFormat("fp4")
