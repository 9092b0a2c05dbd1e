// The CUDA runtime and cuBLAS as a GPU that computes nothing: torch's own CUDA code runs on the host, its kernels do
// not.
//
// Preloaded before torch's libraries, it takes their calls. Memory is the host's, kernels and products are counted by
// name and left out, and a wait for the device returns at once and is counted. A stream that is being captured refuses
// waits, as a real one does. What torch calls and is not here, null_gpu.py fills in: functions that return success.
//
// null_count(name) returns a counter, null_reset() sets all to zero, null_kernels(path) writes launches by kernel.

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define EXPORT __attribute__((visibility("default")))
#define CALL EXPORT cudaError_t

// -- counters --------------------------------------------------------------------------------------------------------

static long launches, products, copies, fills, waits, allocations, events, captures, replays, nodes, pageable;
static const struct {
    const char *name;
    long *value;
} COUNTERS[] = {
    {"launches", &launches}, {"products", &products},       {"copies", &copies}, {"fills", &fills},
    {"waits", &waits},       {"allocations", &allocations}, {"events", &events}, {"replays", &replays},
    {"nodes", &nodes},       {"pageable", &pageable},       {"captures", &captures},
};
#define COUNTER_NUMBER (sizeof COUNTERS / sizeof *COUNTERS)

// Kernels by the host function that stands for them, in a hash table.
#define TABLE 65536
static struct {
    const void *function;
    const char *name;
    long launches;
} kernels[TABLE];
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;

static size_t slot_of(const void *function) {
    size_t slot = ((size_t)function >> 4) * 2654435761u % TABLE;
    while (kernels[slot].function && kernels[slot].function != function) slot = (slot + 1) % TABLE;
    kernels[slot].function = function;
    return slot;
}

EXPORT long null_count(const char *name) {
    for (size_t i = 0; i < COUNTER_NUMBER; i++)
        if (!strcmp(name, COUNTERS[i].name)) return *COUNTERS[i].value;
    return -1;
}

EXPORT void null_reset(void) {
    for (size_t i = 0; i < COUNTER_NUMBER; i++) *COUNTERS[i].value = 0;
    for (size_t i = 0; i < TABLE; i++) kernels[i].launches = 0;
}

EXPORT void null_kernels(const char *path) {
    FILE *file = fopen(path, "w");
    for (size_t i = 0; i < TABLE; i++)
        if (kernels[i].launches)
            fprintf(file, "%ld\t%s\n", kernels[i].launches, kernels[i].name ? kernels[i].name : "?");
    fclose(file);
}

// -- capture ---------------------------------------------------------------------------------------------------------

static cudaStream_t capturing;
static pthread_t capturing_thread;
static enum cudaStreamCaptureMode capturing_mode;
// How strict a thread is with itself: relaxed inside a guard of torch.
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static unsigned long long capture_number = 10;
static long captured;
static int invalid;
static cudaGraph_t const GRAPH = (cudaGraph_t)0x77;

// What a stream that is being captured takes as a node, from any thread: backward has one of its own.
static void work(long *counter) {
    __sync_fetch_and_add(counter, 1);
    if (capturing) captured++;
}

// Whether a capture forbids this thread to wait, by the modes of both.
static int is_forbidden(void) {
    if (!capturing || thread_mode == cudaStreamCaptureModeRelaxed) return 0;
    if (pthread_equal(pthread_self(), capturing_thread)) return capturing_mode != cudaStreamCaptureModeRelaxed;
    return capturing_mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
}

// What has the host wait for the device: counted, and refused during a capture.
static cudaError_t wait_for_device(const char *what) {
    waits++;
    if (!is_forbidden()) return cudaSuccess;
    invalid = 1;
    fprintf(stderr, "null GPU: %s while a stream is captured\n", what);
    return cudaErrorStreamCaptureUnsupported;
}

CALL cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    capturing = stream;
    capturing_thread = pthread_self();
    capturing_mode = mode;
    captures++;
    capture_number++;
    captured = invalid = 0;
    return cudaSuccess;
}

CALL cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    capturing = 0;
    nodes = captured;
    *graph = GRAPH;
    return invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}

CALL cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = capturing && stream == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

CALL cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                              cudaGraph_t *graph, const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
                              size_t *count) {
    if (status) cudaStreamIsCapturing(stream, status);
    if (id) *id = capturing && stream == capturing ? capture_number : 0;
    if (graph) *graph = GRAPH;
    if (dependencies) *dependencies = 0;
    if (edges) *edges = 0;
    if (count) *count = 0;
    return cudaSuccess;
}

CALL cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *found, size_t *count) {
    *count = nodes;
    return cudaSuccess;
}

CALL cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    *executable = (cudaGraphExec_t)0x78;
    return cudaSuccess;
}

CALL cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(executable, graph, flags);
}

CALL cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    replays++;
    return cudaSuccess;
}

// -- the device: one H200 --------------------------------------------------------------------------------------------

static __thread int current;
enum { CUDA_VERSION_HERE = 13020, PROCESSORS = 132, THREADS = 2048, BLOCK = 1024 };
static const size_t TOTAL = 140ull << 30, FREE = 139ull << 30;

CALL cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}
CALL cudaGetDevice(int *device) {
    *device = current;
    return cudaSuccess;
}
CALL cudaSetDevice(int device) {
    current = device;
    return cudaSuccess;
}
CALL cudaDriverGetVersion(int *version) {
    *version = CUDA_VERSION_HERE;
    return cudaSuccess;
}
CALL cudaRuntimeGetVersion(int *version) {
    *version = CUDA_VERSION_HERE;
    return cudaSuccess;
}

CALL cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H200");
    p->major = 9;
    p->totalGlobalMem = TOTAL;
    p->multiProcessorCount = PROCESSORS;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = BLOCK;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = THREADS;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->l2CacheSize = 50 << 20;
    p->memoryBusWidth = 6144;
    p->unifiedAddressing = p->memoryPoolsSupported = p->cooperativeLaunch = 1;
    p->textureAlignment = 512;
    return cudaSuccess;
}

CALL cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = PROCESSORS; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = BLOCK; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = THREADS; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: *value = 65535; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1;
    }
    return cudaSuccess;
}

CALL cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
CALL cudaMemGetInfo(size_t *free, size_t *total) {
    *free = FREE;
    *total = TOTAL;
    return cudaSuccess;
}
CALL cudaDeviceGetPCIBusId(char *text, int size, int device) {
    strncpy(text, "0000:01:00.0", size);
    return cudaSuccess;
}
CALL cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return cudaSuccess;
}

CALL cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = BLOCK;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    return cudaSuccess;
}

CALL cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int size, size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}

CALL cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared,
                                                            unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

EXPORT const char *cudaGetErrorName(cudaError_t error) { return "null GPU"; }
EXPORT const char *cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorStreamCaptureUnsupported) return "operation not permitted when stream is capturing";
    if (error == cudaErrorStreamCaptureInvalidated) return "operation failed due to a previous error during capture";
    return error ? "error of the null GPU" : "no error";
}

// -- memory: the host's ----------------------------------------------------------------------------------------------

// Pinned memory, to tell a copy from it from one that torch has the host wait for.
#define PINNED 4096
static struct {
    char *start;
    size_t size;
} pinned[PINNED];
static pthread_mutex_t pinned_lock = PTHREAD_MUTEX_INITIALIZER;

static int is_pinned(const void *pointer) {
    for (size_t i = 0; i < PINNED; i++)
        if (pinned[i].start && (char *)pointer >= pinned[i].start && (char *)pointer < pinned[i].start + pinned[i].size)
            return 1;
    return 0;
}

CALL cudaMalloc(void **pointer, size_t size) {
    allocations++;
    // Zeroed: what a kernel would have written is read here as it is.
    *pointer = aligned_alloc(512, (size + 511) / 512 * 512);
    memset(*pointer, 0, size);
    return cudaSuccess;
}

CALL cudaMallocAsync(void **pointer, size_t size, cudaStream_t stream) { return cudaMalloc(pointer, size); }
CALL cudaMallocManaged(void **pointer, size_t size, unsigned flags) { return cudaMalloc(pointer, size); }

CALL cudaFree(void *pointer) {
    if (pointer && capturing) return wait_for_device("cudaFree");
    free(pointer);
    return cudaSuccess;
}

CALL cudaFreeAsync(void *pointer, cudaStream_t stream) {
    free(pointer);
    return cudaSuccess;
}

CALL cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    *pointer = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    pthread_mutex_lock(&pinned_lock);
    for (size_t i = 0; i < PINNED; i++)
        if (!pinned[i].start) {
            pinned[i].start = *pointer;
            pinned[i].size = size;
            break;
        }
    pthread_mutex_unlock(&pinned_lock);
    return cudaSuccess;
}

CALL cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }

CALL cudaFreeHost(void *pointer) {
    pthread_mutex_lock(&pinned_lock);
    for (size_t i = 0; i < PINNED; i++)
        if (pinned[i].start == pointer) pinned[i].start = 0;
    pthread_mutex_unlock(&pinned_lock);
    free(pointer);
    return cudaSuccess;
}

CALL cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    cudaError_t error = wait_for_device("cudaMemcpy");
    copies++;
    if (!error) memmove(to, from, size);
    return error;
}

CALL cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    work(&copies);
    if (kind == cudaMemcpyHostToDevice && !is_pinned(from)) __sync_fetch_and_add(&pageable, 1);
    memmove(to, from, size);
    return cudaSuccess;
}

CALL cudaMemset(void *to, int value, size_t size) {
    fills++;
    memset(to, value, size);
    return cudaSuccess;
}
CALL cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    work(&fills);
    memset(to, value, size);
    return cudaSuccess;
}

CALL cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = is_pinned(pointer) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}

// -- streams and events ----------------------------------------------------------------------------------------------

static long handle = 0x1000;

CALL cudaStreamCreate(cudaStream_t *stream) {
    *stream = (cudaStream_t)(handle += 16);
    return cudaSuccess;
}
CALL cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreate(stream); }
CALL cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int p) { return cudaStreamCreate(stream); }
CALL cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

CALL cudaStreamSynchronize(cudaStream_t stream) {
    // Another stream than the captured one may be waited for: torch does so where a capture first draws.
    if (capturing && stream != capturing) {
        waits++;
        return cudaSuccess;
    }
    return wait_for_device("cudaStreamSynchronize");
}

CALL cudaDeviceSynchronize(void) { return wait_for_device("cudaDeviceSynchronize"); }
CALL cudaEventSynchronize(cudaEvent_t event) { return wait_for_device("cudaEventSynchronize"); }
CALL cudaStreamQuery(cudaStream_t stream) { return capturing ? wait_for_device("cudaStreamQuery") : cudaSuccess; }
CALL cudaEventQuery(cudaEvent_t event) { return capturing ? wait_for_device("cudaEventQuery") : cudaSuccess; }
CALL cudaEventCreate(cudaEvent_t *event) {
    *event = (cudaEvent_t)(handle += 16);
    return cudaSuccess;
}
CALL cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
CALL cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
    *ms = 1.0f;
    return cudaSuccess;
}
CALL cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    work(&events);
    return cudaSuccess;
}
CALL cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned f) {
    work(&events);
    return cudaSuccess;
}
CALL cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

// -- kernels ---------------------------------------------------------------------------------------------------------

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configuration;

EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *any;
    return &any;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **any) {}
EXPORT void __cudaUnregisterFatBinary(void **any) {}
EXPORT void __cudaRegisterVar(void) {}

EXPORT void __cudaRegisterFunction(void **any, const char *function, char *device_function, const char *name, int limit,
                                   void *a, void *b, void *c, void *d, int *e) {
    pthread_mutex_lock(&table_lock);
    kernels[slot_of(function)].name = name;
    pthread_mutex_unlock(&table_lock);
}

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}

CALL __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(void **)stream = configuration.stream;
    return cudaSuccess;
}

static cudaError_t launch(const void *function) {
    work(&launches);
    pthread_mutex_lock(&table_lock);
    kernels[slot_of(function)].launches++;
    pthread_mutex_unlock(&table_lock);
    return cudaSuccess;
}

CALL __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
CALL __cudaLaunchKernel(cudaKernel_t kernel, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) {
    return launch(kernel);
}
CALL cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return launch(f); }
CALL cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *function, void **a) { return launch(function); }

// -- the driver's entry points, which torch asks the runtime for -----------------------------------------------------

static int succeed(void) { return 0; }
static int is_active(int device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    return 0;
}

CALL cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                      enum cudaDriverEntryPointQueryResult *result) {
    *function = strstr(name, "PrimaryCtxGetState") ? (void *)is_active : (void *)succeed;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// -- cuBLAS ----------------------------------------------------------------------------------------------------------

EXPORT int cublasCreate_v2(void **blas) {
    *blas = (void *)0x9;
    return 0;
}
EXPORT int cublasGetMathMode(void *blas, int *mode) {
    *mode = 0;
    return 0;
}
EXPORT int cublasGetPointerMode_v2(void *blas, int *mode) {
    *mode = 0;
    return 0;
}
EXPORT size_t cublasLtGetVersion(void) { return 130400; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *l, void *d, void *a, void *b, void *c, void *e, void *p, int wanted,
                                          void *results, int *found) {
    memset(results, 0, 128);
    *found = 1;
    return 0;
}

#define PRODUCT(name)                                                                                                  \
    EXPORT int name(void) {                                                                                            \
        work(&products);                                                                                               \
        return 0;                                                                                                      \
    }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasLtMatmul)
