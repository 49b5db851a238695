// Memory of large gradients. Allocating new pages takes longer than computing the loss, so the last freed block is
// kept.
#pragma once

#include <cstdint>

namespace amtss {

// Gradients of this many bytes and more are in such memory, and are written past the cache.
constexpr int64_t large_gradient = 4 << 20;

struct Block {
    char* memory;  // starts at a large page; its contents are arbitrary
    int64_t bytes;

    explicit Block(int64_t bytes);  // throws std::bad_alloc
    ~Block();
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
};

// The kept block if it has `bytes` to 2 * `bytes` bytes, otherwise a new one.
Block* take_block(int64_t bytes);

// Keeps the block for the next take_block and frees the one kept before. On low memory the system may take its pages.
void give_block(Block* block);

// Frees the kept block.
void release_kept();

}  // namespace amtss
