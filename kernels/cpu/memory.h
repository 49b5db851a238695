// Memory of large gradients. Fresh pages cost more time than the loss that fills them, so what is freed last is kept.
#pragma once

#include <cstdint>

namespace amtss {

// Gradients of this many bytes and more are kept, and written around the cache.
constexpr int64_t large_gradient = 4 << 20;

struct Block {
    char* memory;  // begins at a large page; its contents are arbitrary
    int64_t bytes;

    explicit Block(int64_t bytes);  // throws std::bad_alloc
    ~Block();
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
};

// The kept block if it is large enough and at most twice as large, or else a new one.
Block* take_block(int64_t bytes);

// Keeps the block for the next taker in place of what was kept before. Until then the system may have its pages.
void give_block(Block* block);

// Hands what is kept back to the system.
void release_kept();

}  // namespace amtss
