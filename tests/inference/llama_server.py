"""llama.cpp's own server on a GGUF file, in a process of its own: prints its address, and serves
until it is killed or its input ends.

python llama_server.py model.gguf
"""

import sys

import xllamacpp


def main() -> None:
    told = xllamacpp.CommonParams()
    told.model.path = sys.argv[1]
    told.n_ctx, told.n_parallel, told.cpuparams.n_threads, told.verbosity = 256, 1, 1, -1
    told.warmup = False
    exact = xllamacpp.ggml_type.GGML_TYPE_F32
    told.cache_type_k = told.cache_type_v = exact
    told.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(told)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
