// Each part of the loader binds itself to the one Python module.
#pragma once

#include <pybind11/pybind11.h>

void bind_images(pybind11::module_& module);
void bind_pairs(pybind11::module_& module);
