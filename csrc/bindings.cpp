#include "bindings.hpp"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace {

std::atomic<bool> ending = false;
std::atomic<int> asking = 0;
std::thread::id ends;

void stop_asking() {
    ends = std::this_thread::get_id();
    ending = true;
    const Unlocked unlocked;
    while (asking > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

}  // namespace

Asking::Asking() { ++asking; }

Asking::~Asking() { --asking; }

bool Asking::too_late() const { return ending && std::this_thread::get_id() != ends; }

Unlocked::~Unlocked() {
    for (;;) {
        {
            const Asking asked;
            if (!asked.too_late()) {
                PyEval_RestoreThread(state_);
                return;
            }
        }
        std::this_thread::sleep_for(std::chrono::hours(1));
    }
}

PYBIND11_MODULE(_loader, module) {
    module.doc() = "Batches from shards and from the store; shapes and errors are documented in _loader.pyi.";
    // A forked child has none of the threads.
    pthread_atfork(nullptr, nullptr, [] { asking = 0; });
    pybind11::module_::import("atexit").attr("register")(pybind11::cpp_function(&stop_asking));
    bind_images(module);
    bind_pairs(module);
}
