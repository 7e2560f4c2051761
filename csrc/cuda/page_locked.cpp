// tolaria::page_locked: host memory that the device reads and writes by the host's own addresses.
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>
#include <unistd.h>

#include "ops.h"

namespace tolaria {
namespace {

// What a failed call leaves behind would be taken for the error of the next kernel launch.
void forget_error() { static_cast<void>(cudaGetLastError()); }

// Lets this thread take and free memory while a graph is being recorded. c10's own throws, which a deleter must not.
struct BesideRecordings {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  BesideRecordings() { exchange(); }
  ~BesideRecordings() { exchange(); }
  BesideRecordings(const BesideRecordings&) = delete;
  BesideRecordings& operator=(const BesideRecordings&) = delete;
  void exchange() {
    if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) forget_error();
  }
};

// Runs in whatever garbage collection comes upon it: beside a recording, in a forked child, at the end of the process.
// Work that uses the memory is waited for by those who enqueued it; freeing waits for the device, too.
void release(void* memory, pid_t owner) {
  if (getpid() != owner) return;  // a forked child has the addresses, not the device
  const BesideRecordings relaxed;
  if (cudaFreeHost(memory) != cudaSuccess) forget_error();  // the driver is unloading, and takes all with it
}

}  // namespace

at::Tensor page_locked(int64_t nbytes) {
  TORCH_CHECK_VALUE(nbytes > 0, "nbytes: expected a positive number, got ", nbytes);
  const BesideRecordings relaxed;
  void* memory = nullptr;
  const cudaError_t status = cudaHostAlloc(&memory, nbytes, cudaHostAllocPortable | cudaHostAllocMapped);
  if (status != cudaSuccess) {
    forget_error();
    TORCH_CHECK(false, "cudaHostAlloc: ", cudaGetErrorString(status));
  }
  const pid_t owner = getpid();
  at::Tensor bytes = at::from_blob(
      memory, {nbytes}, [owner](void* pointer) { release(pointer, owner); }, at::TensorOptions().dtype(at::kByte));
  // The tables hold host addresses. Without one address space for both (some WSL2 and WDDM set-ups) they mean nothing
  // to the device.
  void* on_device = nullptr;
  if (cudaHostGetDevicePointer(&on_device, memory, 0) != cudaSuccess) forget_error();
  TORCH_CHECK(on_device == memory, "the device cannot use host memory by the host's addresses");
  return bytes;
}

}  // namespace tolaria
