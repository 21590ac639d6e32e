#include "bindings.hpp"

void bind_images(pybind11::module_&) {}
