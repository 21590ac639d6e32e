// The module's parts, and what they share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "batch.hpp"

void bind_images(pybind11::module_& module);
void bind_pairs(pybind11::module_& module);

// Threads that want the interpreter once it ends would wait for ever, or be killed with what they hold.
class Asking {
  public:
    Asking();
    ~Asking();
    // Then the thread must not ask.
    bool too_late() const;
};

// The interpreter is free for other threads as long as this lives. A thread that comes back when the program ends never
// goes on, as Python's own do.
class Unlocked {
  public:
    Unlocked() : state_(PyEval_SaveThread()) {}
    ~Unlocked();
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

  private:
    PyThreadState* state_;
};

constexpr int kAligned = pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_;

inline std::string described(const pybind11::array& array) {
    return std::to_string(array.ndim()) + "-D " + pybind11::str(array.dtype()).cast<std::string>() +
           ((array.flags() & pybind11::array::c_style) != 0 ? "" : ", not contiguous") +
           ((array.flags() & kAligned) != 0 ? "" : ", not aligned");
}

// The array's own memory, which it must outlive.
template <class T>
efficientclip::View<T> view(const pybind11::array& array, const char* name) {
    constexpr int kPlain = pybind11::array::c_style | kAligned;
    if (!pybind11::isinstance<pybind11::array_t<T>>(array) || array.ndim() != 1 || (array.flags() & kPlain) != kPlain) {
        const std::string dtype = pybind11::str(pybind11::dtype::of<T>()).template cast<std::string>();
        throw pybind11::type_error(std::string(name) + " must be a contiguous 1-D " + dtype + " array, not " +
                                   described(array) + ": np.require(" + name + ", np." + dtype + ", \"CA\") makes one");
    }
    return {static_cast<const T*>(array.data()), array.size()};
}
