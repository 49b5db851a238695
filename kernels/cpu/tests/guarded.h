// Memory that lies against pages which nobody may touch, and notices what is written beside it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define AMTSS_POISON(from, bytes) ASAN_POISON_MEMORY_REGION(from, bytes)
#define AMTSS_UNPOISON(from, bytes) ASAN_UNPOISON_MEMORY_REGION(from, bytes)
#else
#define AMTSS_POISON(from, bytes) ((void)(from), (void)(bytes))
#define AMTSS_UNPOISON(from, bytes) ((void)(from), (void)(bytes))
#endif

namespace {

// Some megabytes between two forbidden pages. An array begins right behind the first one or ends right before the second;
// on its other side, marked bytes show writes, and an address sanitizer reads too.
class Guarded {
    static constexpr size_t page = 4096, capacity = 32 << 20, marked = 256;
    static constexpr uint8_t mark = 0xa5;
    uint8_t *memory, *data = nullptr;
    size_t bytes = 0;
    bool at_end = false;

    uint8_t* marks() const { return at_end ? data - marked : data + bytes; }

public:
    Guarded() {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* const mapped = mmap(nullptr, capacity + 2 * page, PROT_NONE, flags, -1, 0);
        memory = static_cast<uint8_t*>(mapped) + page;
        if (mapped == MAP_FAILED || mprotect(memory, capacity, PROT_READ | PROT_WRITE) != 0) std::abort();
    }
    ~Guarded() {
        AMTSS_UNPOISON(memory, capacity);
        munmap(memory - page, capacity + 2 * page);
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    // Room for `size` bytes, a multiple of their type's size.
    uint8_t* place(size_t size, bool end) {
        if (size + marked > capacity) std::abort();
        if (data) AMTSS_UNPOISON(marks(), marked);
        bytes = size;
        at_end = end;
        data = end ? memory + capacity - size : memory;
        std::memset(marks(), mark, marked);
        AMTSS_POISON(marks(), marked);
        return data;
    }

    bool intact() const {
        AMTSS_UNPOISON(marks(), marked);
        const bool is = std::all_of(marks(), marks() + marked, [](uint8_t byte) { return byte == mark; });
        AMTSS_POISON(marks(), marked);
        return is;
    }
};

// The arrays of one call. The same memory serves all calls.
class Arrays {
    std::vector<std::unique_ptr<Guarded>> places;
    struct Input {
        const uint8_t* data;
        std::vector<uint8_t> wanted;
    };
    std::vector<Input> inputs;
    size_t used = 0;

    uint8_t* next(size_t bytes, bool end) {
        if (used == places.size()) places.push_back(std::make_unique<Guarded>());
        return places[used++]->place(bytes, end);
    }

public:
    void clear() {
        used = 0;
        inputs.clear();
    }
    template <class T>
    T* input(const std::vector<T>& values, bool end) {
        const size_t bytes = values.size() * sizeof(T);
        uint8_t* const data = next(bytes, end);
        if (bytes) std::memcpy(data, values.data(), bytes);
        inputs.push_back({data, {data, data + bytes}});
        return reinterpret_cast<T*>(data);
    }
    // Poisoned: NaN in every floating type.
    template <class T>
    T* output(size_t count, bool end) {
        uint8_t* const data = next(count * sizeof(T), end);
        std::memset(data, 0xff, count * sizeof(T));
        return reinterpret_cast<T*>(data);
    }
    void check(const char* where) const {
        for (size_t i = 0; i < used; i++) CHECK(places[i]->intact(), "%s: wrote beside array %zu", where, i);
        for (const Input& input : inputs)
            CHECK(std::equal(input.wanted.begin(), input.wanted.end(), input.data), "%s: wrote to an input", where);
    }
};

}  // namespace
