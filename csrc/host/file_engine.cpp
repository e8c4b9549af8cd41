// Owns the work of FileEngine's threads.
// Knows nothing of how files were opened.
#include "host/file_engine.h"

#include <unistd.h>
#include <cerrno>

#include <algorithm>

namespace deepcore {

namespace {

bool is_aligned(const void* memory, int64_t nbytes, int64_t offset) {
    return (reinterpret_cast<uintptr_t>(memory) | static_cast<uintptr_t>(nbytes) | static_cast<uintptr_t>(offset)) %
               kDirectAlign ==
           0;
}

// One block, whole; a system call may do less than it was asked for.
Failure transfer(bool writes, int descriptor, char* memory, int64_t nbytes, int64_t offset) {
    int64_t done = 0;
    while (done < nbytes) {
        const ssize_t count = writes ? pwrite(descriptor, memory + done, nbytes - done, offset + done)
                                     : pread(descriptor, memory + done, nbytes - done, offset + done);
        if (count > 0) {
            done += count;
        } else if (count == 0) {
            return {writes ? EIO : 0, offset + done, nbytes - done};
        } else if (errno != EINTR) {
            return {errno, offset + done, 0};
        }
    }
    return {};
}

}  // namespace

FileEngine::FileEngine(int threads, int64_t block_size) : block_size_(block_size) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { serve(); });
}

FileEngine::~FileEngine() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();  // they finish what was submitted: its memory is in use
}

int64_t FileEngine::read(int direct, int plain, void* memory, int64_t nbytes, int64_t offset) {
    return submit(false, direct, plain, static_cast<char*>(memory), nbytes, offset);
}

int64_t FileEngine::write(int direct, int plain, const void* memory, int64_t nbytes, int64_t offset) {
    return submit(true, direct, plain, const_cast<char*>(static_cast<const char*>(memory)), nbytes, offset);
}

int64_t FileEngine::submit(bool writes, int direct, int plain, char* memory, int64_t nbytes, int64_t offset) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t ticket = next_ticket_++;
    Request& request = requests_[ticket];
    for (int64_t at = 0; at < nbytes; at += block_size_) {
        blocks_.push_back(
            {ticket, writes, direct, plain, memory + at, std::min(block_size_, nbytes - at), offset + at});
        ++request.blocks_left;
    }
    work_.notify_all();
    return ticket;
}

Failure FileEngine::wait(int64_t ticket) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto found = requests_.find(ticket);
    if (found == requests_.end()) return {EINVAL, 0, 0};
    done_.wait(lock, [&] { return found->second.blocks_left == 0; });
    const Failure failure = found->second.failure;
    requests_.erase(found);
    return failure;
}

void FileEngine::serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        work_.wait(lock, [&] { return stopping_ || !blocks_.empty(); });
        if (blocks_.empty()) return;
        const Block block = blocks_.front();
        blocks_.pop_front();
        lock.unlock();
        const bool direct = block.direct >= 0 && is_aligned(block.memory, block.nbytes, block.offset);
        Failure failure =
            transfer(block.writes, direct ? block.direct : block.plain, block.memory, block.nbytes, block.offset);
        if (direct && failure.code == EINVAL) {  // a file system that wants more than our alignment
            failure = transfer(block.writes, block.plain, block.memory, block.nbytes, block.offset);
        }
        lock.lock();
        Request& request = requests_.at(block.ticket);
        if (request.failure.code == 0 && request.failure.missing == 0) request.failure = failure;
        if (--request.blocks_left == 0) done_.notify_all();
    }
}

}  // namespace deepcore
