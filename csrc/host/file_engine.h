// Owns asynchronous reads and writes of files: requests cut into blocks, which a pool of threads works off in order.
// Knows nothing of Python or of what the bytes mean. Memory belongs to the caller and has to live until the wait.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace deepcore {

constexpr int64_t kDirectAlign = 4096;  // bytes: address, offset and length of what may bypass the page cache

struct Failure {
    int code = 0;                     // errno, or 0
    int64_t offset = 0, missing = 0;  // bytes: where, and how many a file that is too short did not have
};

class FileEngine {
  public:
    FileEngine(int threads, int64_t block_size);
    ~FileEngine();
    FileEngine(const FileEngine&) = delete;
    FileEngine& operator=(const FileEngine&) = delete;

    // Both return a ticket. direct: a descriptor opened with O_DIRECT, or -1; plain: one without.
    int64_t read(int direct, int plain, void* memory, int64_t nbytes, int64_t offset);
    int64_t write(int direct, int plain, const void* memory, int64_t nbytes, int64_t offset);

    // Returns when the request is over; a ticket can be waited for once.
    Failure wait(int64_t ticket);

  private:
    struct Request {
        int64_t blocks_left = 0;
        Failure failure;
    };
    struct Block {
        int64_t ticket;
        bool writes;
        int direct, plain;
        char* memory;
        int64_t nbytes, offset;
    };

    int64_t submit(bool writes, int direct, int plain, char* memory, int64_t nbytes, int64_t offset);
    void serve();

    const int64_t block_size_;
    std::mutex mutex_;
    std::condition_variable work_, done_;
    std::deque<Block> blocks_;
    std::map<int64_t, Request> requests_;
    int64_t next_ticket_ = 1;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace deepcore
