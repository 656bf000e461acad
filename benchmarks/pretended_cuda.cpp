// A CUDA device that is not there, for torch's CUDA 13 wheel on Linux: loaded first (LD_PRELOAD), it answers in place of
// the CUDA runtime, the driver, cuBLAS and cuDNN. torch's host code runs as it is: dispatch, autograd, memory allocator,
// choice of kernels as for an H100. Kernels are counted, not run. Device memory is addresses that nobody may read, and
// what is copied from it is zeros. What is not answered here reaches the real library, which reports an error.
// benchmarks/estimate.py builds and reads it.
#include <cuda_runtime_api.h>
#include <cudnn.h>
#include <sys/mman.h>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#define API extern "C"
// A function of the API by its name, whose arguments matter only where they are named.
#define ANSWER(name, ...) API int answer_##name(__VA_ARGS__) __asm__(#name); int answer_##name(__VA_ARGS__)
#define SUCCEED(name) ANSWER(name) { return 0; }
#define LAUNCH(name) ANSWER(name) { ++launches; return 0; }
#define WAIT(name) ANSWER(name) { wait(); return 0; }
#define CREATE(name) ANSWER(name, void** made) { *made = make_handle(); return 0; }

static const size_t SPAN = 1ull << 44, TOTAL = 1ull << 40, PAGE = 4096, SEGMENT = 2 << 20;  // bytes
static const int VERSION = CUDART_VERSION;
static std::atomic<unsigned long long> launches{0}, handles{0x1000};
static std::atomic<void (*)()> on_wait{nullptr};
static std::mutex lock;
static std::map<char*, size_t> allocated, pinned;  // bytes of each block, on the device and in host memory
static char *first, *next;
static size_t used;

static void* make_handle() { return (void*)(handles += 16); }
static void wait() {
  if (auto call = on_wait.load()) call();
}

// What estimate.py reads. `call` is called wherever the host waits for the device.
API unsigned long long pretended_launches() { return launches; }
API void pretended_on_wait(void (*call)()) { on_wait = call; }

// ---- Device ----
ANSWER(cudaGetDeviceCount, int* count) { return *count = 1, 0; }
ANSWER(cudaGetDevice, int* device) { return *device = 0, 0; }
ANSWER(cudaDriverGetVersion, int* version) { return *version = VERSION, 0; }
ANSWER(cudaRuntimeGetVersion, int* version) { return *version = VERSION, 0; }
ANSWER(cudaDeviceCanAccessPeer, int* can) { return *can = 0, 0; }
ANSWER(cudaDeviceGetPCIBusId, char* id, int size) { return snprintf(id, size, "0000:00:00.0"), 0; }
ANSWER(cudaDeviceGetStreamPriorityRange, int* least, int* greatest) { return *least = 0, *greatest = -5, 0; }
ANSWER(cudaGetDeviceProperties, cudaDeviceProp* made) {
  cudaDeviceProp p = {};
  strcpy(p.name, "pretended H100");
  p.major = 9, p.warpSize = 32, p.multiProcessorCount = 132, p.totalGlobalMem = TOTAL, p.totalConstMem = 65536;
  p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiProcessor = 2048, p.maxBlocksPerMultiProcessor = 32;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024, p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 2147483647, p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.sharedMemPerBlock = 49152, p.sharedMemPerBlockOptin = 232448, p.sharedMemPerMultiprocessor = 233472;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.l2CacheSize = 50 << 20, p.textureAlignment = 512;
  p.canMapHostMemory = p.concurrentKernels = p.unifiedAddressing = p.clusterLaunch = p.cooperativeLaunch = 1;
  p.asyncEngineCount = 3;
  return *made = p, 0;
}
ANSWER(cudaDeviceGetAttribute, int* value, int attribute) {
  static const std::map<int, int> values = {
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152}, {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472}, {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrComputeCapabilityMajor, 9}, {cudaDevAttrMaxThreadsPerBlock, 1024}, {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}, {cudaDevAttrMaxGridDimX, 2147483647}};
  auto found = values.find(attribute);
  return *value = found == values.end() ? 0 : found->second, 0;
}
SUCCEED(cudaSetDevice) SUCCEED(cudaGetLastError) SUCCEED(cudaPeekAtLastError)
WAIT(cudaDeviceSynchronize)

// ---- Kernels ----
struct Launch { dim3 grid, block; size_t shared; void* stream; };
static thread_local std::vector<Launch> pending;
API void** __cudaRegisterFatBinary(void*) { static void* handle[4]; return handle; }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction() {}
API void __cudaRegisterVar() {}
API char __cudaInitModule(void**) { return 0; }
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  return pending.push_back({grid, block, shared, stream}), 0;
}
API int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void** stream) {
  Launch last = pending.back();
  pending.pop_back();
  return *grid = last.grid, *block = last.block, *shared = last.shared, *stream = last.stream, 0;
}
ANSWER(__cudaGetKernel, const void** kernel, const void* function) { return *kernel = function, 0; }
ANSWER(cudaGetSymbolAddress, const void** address, const void* symbol) { return *address = symbol, 0; }
ANSWER(cudaFuncGetAttributes, cudaFuncAttributes* made) {
  cudaFuncAttributes a = {};
  a.binaryVersion = a.ptxVersion = 90, a.maxThreadsPerBlock = 1024, a.numRegs = 32;
  return *made = a, 0;
}
ANSWER(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int* blocks) { return *blocks = 2, 0; }
SUCCEED(cudaFuncSetAttribute) SUCCEED(cudaKernelSetAttributeForDevice)
LAUNCH(__cudaLaunchKernel) LAUNCH(cudaLaunchKernel) LAUNCH(cudaLaunchKernelExC)

// ---- Memory ----
static bool is_on_device(const void* p) { return first && (char*)p >= first && (char*)p < first + SPAN; }
static bool is_pinned(const void* p) {
  std::lock_guard<std::mutex> guard(lock);
  auto after = pinned.upper_bound((char*)p);
  return after != pinned.begin() && (--after, (char*)p < after->first + after->second);
}
ANSWER(cudaMalloc, void** made, size_t size) {
  std::lock_guard<std::mutex> guard(lock);
  if (!first) {
    void* span = mmap(nullptr, SPAN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (span == MAP_FAILED) return cudaErrorMemoryAllocation;
    first = next = (char*)span;
  }
  size = (size + SEGMENT - 1) / SEGMENT * SEGMENT;
  if (used + size > TOTAL || next + size > first + SPAN) return cudaErrorMemoryAllocation;
  *made = next, allocated[next] = size, next += size, used += size;
  return 0;
}
ANSWER(cudaFree, void* p) {
  std::lock_guard<std::mutex> guard(lock);
  auto block = allocated.find((char*)p);
  if (block != allocated.end()) used -= block->second, allocated.erase(block);
  return 0;
}
ANSWER(cudaMemGetInfo, size_t* free, size_t* total) { return *total = TOTAL, *free = TOTAL - used, 0; }
ANSWER(cudaHostAlloc, void** made, size_t size) {
  *made = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*made == MAP_FAILED) return cudaErrorMemoryAllocation;
  std::lock_guard<std::mutex> guard(lock);
  return pinned[(char*)*made] = size, 0;
}
ANSWER(cudaFreeHost, void* p) {
  std::lock_guard<std::mutex> guard(lock);
  auto block = pinned.find((char*)p);
  if (block != pinned.end()) munmap(p, block->second), pinned.erase(block);
  return 0;
}
ANSWER(cudaPointerGetAttributes, cudaPointerAttributes* made, const void* p) {
  cudaPointerAttributes a = {};
  a.type = is_on_device(p) ? cudaMemoryTypeDevice : is_pinned(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  if (a.type == cudaMemoryTypeUnregistered) a.device = cudaInvalidDeviceId;
  else a.devicePointer = (void*)p;
  if (a.type != cudaMemoryTypeDevice) a.hostPointer = (void*)p;
  return *made = a, 0;
}
static void copy(void* to, const void* from, size_t size, bool is_async) {
  if (!is_async) wait();
  if (is_on_device(to)) return;
  if (!is_on_device(from)) {
    memcpy(to, from, size);
  } else if (size < SEGMENT || !is_pinned(to)) {
    memset(to, 0, size);
  } else {  // whole pages of our own mapping are given back: they read as zeros, and take no memory
    size_t head = -(size_t)to % PAGE, pages = (size - head) / PAGE * PAGE;
    memset(to, 0, head), madvise((char*)to + head, pages, MADV_DONTNEED);
    memset((char*)to + head + pages, 0, size - head - pages);
  }
}
ANSWER(cudaMemcpy, void* to, const void* from, size_t size) { return copy(to, from, size, false), 0; }
ANSWER(cudaMemcpyAsync, void* to, const void* from, size_t size) { return copy(to, from, size, true), 0; }
SUCCEED(cudaMemcpyToSymbol) SUCCEED(cudaMemset) SUCCEED(cudaMemsetAsync)

// ---- Streams and events: everything is done at once, and no stream is being captured ----
ANSWER(cudaStreamGetPriority, void*, int* priority) { return *priority = 0, 0; }
ANSWER(cudaStreamIsCapturing, void*, int* status) { return *status = cudaStreamCaptureStatusNone, 0; }
ANSWER(cudaStreamGetCaptureInfo, void*, int* status) { return *status = cudaStreamCaptureStatusNone, 0; }
ANSWER(cudaEventElapsedTime, float* milliseconds) { return *milliseconds = 1, 0; }
CREATE(cudaStreamCreate) CREATE(cudaStreamCreateWithFlags) CREATE(cudaStreamCreateWithPriority)
CREATE(cudaEventCreate) CREATE(cudaEventCreateWithFlags)
SUCCEED(cudaStreamDestroy) SUCCEED(cudaStreamQuery) SUCCEED(cudaStreamWaitEvent) SUCCEED(cudaEventDestroy)
SUCCEED(cudaThreadExchangeStreamCaptureMode) SUCCEED(cudaEventRecord) SUCCEED(cudaEventRecordWithFlags)
SUCCEED(cudaEventQuery)
WAIT(cudaStreamSynchronize) WAIT(cudaEventSynchronize)

// ---- Driver: torch asks the runtime for some functions, others by name, as this library passes for libcuda.so.1 ----
static int succeed() { return 0; }
ANSWER(cuDevicePrimaryCtxGetState, int, unsigned* flags, int* is_active) { return *flags = 0, *is_active = 1, 0; }
ANSWER(cudaGetDriverEntryPointByVersion, const char* name, void** made, unsigned, unsigned long long, int* found) {
  *made = strstr(name, "PrimaryCtxGetState") ? (void*)answer_cuDevicePrimaryCtxGetState : (void*)succeed;
  if (found) *found = cudaDriverEntryPointSuccess;
  return 0;
}
ANSWER(cuDeviceGet, int* device) { return *device = 0, 0; }
ANSWER(cuDeviceGetAttribute, int* value) { return *value = 0, 0; }
CREATE(cuCtxGetCurrent) CREATE(cuDevicePrimaryCtxRetain)
LAUNCH(cuLaunchKernel) LAUNCH(cuLaunchCooperativeKernel)
SUCCEED(cuCtxSetCurrent) SUCCEED(cuFuncGetAttribute) SUCCEED(cuFuncSetAttribute)
SUCCEED(cuFuncSetCacheConfig) SUCCEED(cuGetErrorString) SUCCEED(cuLinkAddData_v2) SUCCEED(cuLinkComplete)
SUCCEED(cuLinkCreate_v2) SUCCEED(cuModuleGetFunction) SUCCEED(cuModuleLoad) SUCCEED(cuModuleLoadData)
SUCCEED(cuModuleLoadDataEx) SUCCEED(cuModuleUnload) SUCCEED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
SUCCEED(cuPointerGetAttribute) SUCCEED(cuTensorMapEncodeTiled)

// ---- cuBLAS and cuBLASLt, whose headers need more than the wheels have ----
CREATE(cublasCreate_v2) CREATE(cublasLtMatmulDescCreate) CREATE(cublasLtMatrixLayoutCreate)
CREATE(cublasLtMatmulPreferenceCreate)
ANSWER(cublasGetMathMode, void*, int* mode) { return *mode = 0, 0; }
ANSWER(cublasGetPointerMode_v2, void*, int* mode) { return *mode = 0, 0; }
struct MatmulHeuristic { uint64_t algorithm[8]; size_t workspace; int status; float waves; int reserved[4]; };
ANSWER(cublasLtMatmulAlgoGetHeuristic, void*, void*, void*, void*, void*, void*, void*, int, MatmulHeuristic* made,
       int* count) { return *made = {}, *count = 1, 0; }
SUCCEED(cublasDestroy_v2) SUCCEED(cublasSetStream_v2) SUCCEED(cublasSetWorkspace_v2) SUCCEED(cublasSetMathMode)
SUCCEED(cublasSetPointerMode_v2) SUCCEED(cublasSetSmCountTarget) SUCCEED(cublasLtMatmulDescDestroy)
SUCCEED(cublasLtMatmulDescSetAttribute) SUCCEED(cublasLtMatrixLayoutDestroy) SUCCEED(cublasLtMatrixLayoutSetAttribute)
SUCCEED(cublasLtMatmulPreferenceDestroy) SUCCEED(cublasLtMatmulPreferenceSetAttribute)
LAUNCH(cublasSgemm_v2) LAUNCH(cublasDgemm_v2) LAUNCH(cublasSgemmEx) LAUNCH(cublasGemmEx) LAUNCH(cublasSdot_v2)
LAUNCH(cublasGemmStridedBatchedEx) LAUNCH(cublasSgemmStridedBatched) LAUNCH(cublasDotEx) LAUNCH(cublasSgemv_v2)
LAUNCH(cublasLtMatmul)

// ---- cuDNN: one engine for everything, without a workspace ----
CREATE(cudnnCreate)
ANSWER(cudnnGetStream, void*, void** stream) { return *stream = nullptr, 0; }
ANSWER(cudnnBackendCreateDescriptor, int, void** made) { return *made = calloc(1, 256), 0; }
ANSWER(cudnnBackendDestroyDescriptor, void* descriptor) { return free(descriptor), 0; }
ANSWER(cudnnBackendGetAttribute, void*, int name, int type, int64_t wanted, int64_t* count, void* value) {
  static const std::map<int, int64_t> values = {
      {CUDNN_ATTR_ENGINEHEUR_RESULTS, 0}, {CUDNN_ATTR_ENGINECFG_ENGINE, 0}, {CUDNN_ATTR_ENGINE_GLOBAL_INDEX, 1},
      {CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT, 1}, {CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, 0},
      {CUDNN_ATTR_ENGINECFG_SHARED_MEMORY_USED, 1024}};
  auto found = values.find(name);
  size_t size = type == CUDNN_TYPE_INT64 ? 8 : type == CUDNN_TYPE_INT32 ? 4 : 0;
  if (count) *count = found != values.end();
  if (found != values.end() && wanted && value) memcpy(value, &found->second, size);
  return 0;
}
SUCCEED(cudnnSetStream) SUCCEED(cudnnBackendSetAttribute) SUCCEED(cudnnBackendFinalize)
LAUNCH(cudnnBackendExecute)
