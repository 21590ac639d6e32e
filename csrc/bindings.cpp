#include "bindings.hpp"

PYBIND11_MODULE(_loader, module) {
    module.doc() = "Batches from shards and from the store; shapes and errors are documented in _loader.pyi.";
    bind_images(module);
    bind_pairs(module);
}
