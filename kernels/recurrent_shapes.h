// The token-serial kernels: dn_recurrent_<kind>_s<head size>_<layout>_<scalar|channel>. build.rs reads these lines too, so
// that the host's launch shapes are the kernels' own.
//
// fast: f32 read 16 bytes at a time, exactly this head size. one: fast, a single token and no options that need more.
// window: fast, more than four tokens, no states in between. any: everything else, up to this head size. The host takes
// the first that fits.
// L lanes hold a column, C columns each; a block has W warps. Fewer lanes a column mean fewer shuffles, more columns a
// lane mean fewer reads of q and k; with value-contiguous states, C is 4 and 32 / L groups of them lie side by side.
//           kind  head layout  L   C  W
DN_RECURRENT(one, 16, kmajor, 4, 2, 1)
DN_RECURRENT(one, 32, kmajor, 8, 4, 1)
DN_RECURRENT(one, 64, kmajor, 16, 4, 2)
DN_RECURRENT(one, 128, kmajor, 16, 4, 2)
DN_RECURRENT(one, 256, kmajor, 32, 4, 4)
DN_RECURRENT(one, 16, vmajor, 4, 4, 1)
DN_RECURRENT(one, 32, vmajor, 8, 4, 1)
DN_RECURRENT(one, 64, vmajor, 8, 4, 2)
DN_RECURRENT(one, 128, vmajor, 8, 4, 2)
DN_RECURRENT(one, 256, vmajor, 16, 4, 4)
DN_RECURRENT(window, 32, kmajor, 8, 2, 2)
DN_RECURRENT(window, 64, kmajor, 8, 2, 4)
DN_RECURRENT(window, 128, kmajor, 8, 2, 4)
DN_RECURRENT(window, 256, kmajor, 16, 4, 4)
DN_RECURRENT(window, 64, vmajor, 16, 4, 4)
DN_RECURRENT(window, 128, vmajor, 16, 4, 4)
DN_RECURRENT(window, 256, vmajor, 16, 4, 4)
DN_RECURRENT(fast, 16, kmajor, 4, 2, 1)
DN_RECURRENT(fast, 32, kmajor, 8, 4, 1)
DN_RECURRENT(fast, 64, kmajor, 16, 4, 2)
DN_RECURRENT(fast, 128, kmajor, 8, 2, 4)
DN_RECURRENT(fast, 256, kmajor, 32, 4, 4)
DN_RECURRENT(fast, 16, vmajor, 4, 4, 1)
DN_RECURRENT(fast, 32, vmajor, 8, 4, 1)
DN_RECURRENT(fast, 64, vmajor, 8, 4, 2)
DN_RECURRENT(fast, 128, vmajor, 8, 4, 2)
DN_RECURRENT(fast, 256, vmajor, 16, 4, 4)
DN_RECURRENT(any, 128, kmajor, 16, 4, 4)
DN_RECURRENT(any, 256, kmajor, 32, 4, 4)
DN_RECURRENT(any, 128, vmajor, 16, 4, 4)
DN_RECURRENT(any, 256, vmajor, 16, 4, 4)
