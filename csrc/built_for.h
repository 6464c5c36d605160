// Which torch a library of ours was compiled for. backends/native.py reads it from the file before it loads the library:
// what was compiled against another torch may crash, or compute with the wrong structs, without a word.
#pragma once

// setup.py defines it: major.minor of the torch whose headers are used, or of the stable ABI that is asked of them.
#ifndef TRAPO_TORCH
#define TRAPO_TORCH unknown
#endif
#define TRAPO_TEXT_OF(x) #x
#define TRAPO_TEXT(x) TRAPO_TEXT_OF(x)

extern "C" __attribute__((used, visibility("default"))) const char trapo_kernels_built_for[] =
    "trapo_kernels_built_for:" TRAPO_TEXT(TRAPO_TORCH) ";";
