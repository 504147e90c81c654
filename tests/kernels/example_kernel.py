"""A kernel for tests of launching and compiling: the products of a matrix's rows with each other."""

import triton
import triton.language as tl


@triton.jit
def square(x, y, stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    block = tl.load(x + row[:, None] * stride + column[None, :])
    product = tl.dot(block, tl.trans(block), input_precision="ieee")
    tl.store(y + row[:, None] * BLOCK + row[None, :], product.to(y.dtype.element_ty))
