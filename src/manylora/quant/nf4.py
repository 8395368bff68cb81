"""`nf4`: four bits a weight whose sixteen values are quantiles of the normal distribution; bitsandbytes' bytes.

Source: QLoRA (arXiv 2305.14314), section 3.
"""

from manylora.quant.four_bit import FourBitFormat

NF4 = FourBitFormat("nf4")
