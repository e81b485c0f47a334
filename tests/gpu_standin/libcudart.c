/* A CUDA runtime without a device.

   Device memory is address space that nobody can touch: the process ends where the host would read it. A copy
   from it brings small numbers, finite in every floating point type. Kernels are counted and do nothing.
   Streams, events, capture and graphs answer as CUDA's, and what is illegal during a capture fails and breaks it.

   CUDA_STANDIN_LOG         file that every call is written to: a star during a capture, name, numbers
   CUDA_STANDIN_CAPABILITY  compute capability, 8.9 unless given
   CUDA_STANDIN_MEMORY      bytes of the device, 24 GiB unless given

   Numbers of errors, attributes and offsets are those of CUDA 13. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DIRECTION = 21, NO_DEVICE_OF_THAT_NUMBER = 101,
  INVALID_HANDLE = 400, NOT_IN_CAPTURE = 900, CAPTURE_INVALIDATED = 901, DEFAULT_STREAM_IN_CAPTURE = 906,
};
enum { TO_DEVICE = 1, TO_HOST = 2, ON_DEVICE = 3, BY_ADDRESS = 4 };
enum { NONE, ACTIVE, INVALIDATED };
enum { GLOBAL_MODE, THREAD_MODE, RELAXED_MODE };

typedef struct { unsigned x, y, z; } dim3;
typedef struct { int flags; } stream_t;
typedef struct { int recorded; double time; } event_t;
typedef struct { int kernels, copies; } graph_t;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int last_error;

/* One capture at a time: that is all ONNX Runtime and this project do. */
static struct { int status, mode; pthread_t thread; void *stream; graph_t *graph; } capture;

static const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value && *value ? value : otherwise;
}

static void say(const char *format, ...) {
  static FILE *file;
  static int opened;
  pthread_mutex_lock(&lock);
  if (!opened) {
    const char *name = getenv("CUDA_STANDIN_LOG");
    file = name ? fopen(name, "w") : NULL;
    if (file) setvbuf(file, NULL, _IOLBF, 1 << 12);
    opened = 1;
  }
  if (file) {
    va_list rest;
    va_start(rest, format);
    if (capture.status) fputs("* ", file);
    vfprintf(file, format, rest);
    fputc('\n', file);
    va_end(rest);
  }
  pthread_mutex_unlock(&lock);
}

static int failed(int error) {
  if (error) last_error = error;
  return error;
}

static int illegal(const char *name, int error) {
  say("ILLEGAL %s %d", name, error);
  return failed(error);
}

/* What may not be called while a stream is capturing, by this thread or, in global mode, by any. */
static int refused(const char *name) {
  if (!capture.status || capture.mode == RELAXED_MODE) return SUCCESS;
  if (capture.mode == THREAD_MODE && !pthread_equal(capture.thread, pthread_self())) return SUCCESS;
  if (capture.status == INVALIDATED) return failed(CAPTURE_INVALIDATED);
  capture.status = INVALIDATED;
  return illegal(name, NOT_IN_CAPTURE);
}
#define LEGAL(name) do { int error_ = refused(name); if (error_) return error_; } while (0)

/* Work on a stream: 1 if it is recorded and does not run, 0 if it runs, a negative error otherwise. */
static int recorded(const char *name, void *stream) {
  if (!capture.status) return 0;
  if (stream == capture.stream) return capture.status == ACTIVE ? 1 : -failed(CAPTURE_INVALIDATED);
  if (stream == NULL || ((stream_t *)stream)->flags != 1) { /* in order with every blocking stream */
    capture.status = INVALIDATED;
    return -illegal(name, DEFAULT_STREAM_IN_CAPTURE);
  }
  return 0;
}

/* ---- memory ------------------------------------------------------------------------------------------------ */

typedef struct { char *start; size_t bytes; int device; } block_t;
static block_t *blocks;
static size_t count, room, used;

static size_t memory(void) { return strtoull(setting("CUDA_STANDIN_MEMORY", "25769803776"), NULL, 10); }

static int take(void **address, size_t bytes, int device) {
  size_t size = bytes ? (bytes + 255) / 256 * 256 : 256;
  if (device && used + size > memory()) return failed(OUT_OF_MEMORY);
  void *start = device ? mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) : NULL;
  if (start == MAP_FAILED || (!device && posix_memalign(&start, 4096, size))) return failed(OUT_OF_MEMORY);
  pthread_mutex_lock(&lock);
  if (count == room) blocks = realloc(blocks, (room = room ? 2 * room : 256) * sizeof *blocks);
  blocks[count++] = (block_t){start, size, device};
  if (device) used += size;
  pthread_mutex_unlock(&lock);
  *address = start;
  return SUCCESS;
}

static int give(void *address, int device) {
  if (!address) return SUCCESS;
  pthread_mutex_lock(&lock);
  size_t i = 0;
  while (i < count && blocks[i].start != address) i++;
  int known = i < count && blocks[i].device == device;
  block_t gone = {0};
  if (known) {
    gone = blocks[i];
    blocks[i] = blocks[--count];
    if (device) used -= gone.bytes;
  }
  pthread_mutex_unlock(&lock);
  if (!known) return illegal("free of what was not allocated", INVALID_VALUE);
  if (device) munmap(gone.start, gone.bytes);
  else free(gone.start);
  return SUCCESS;
}

/* 1: device, 0: page-locked, -1: pageable, -2: partly outside of an allocation. */
static int place(const void *address, size_t bytes) {
  int found = -1;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < count && found == -1; i++) {
    const char *p = address;
    if (p >= blocks[i].start && p < blocks[i].start + blocks[i].bytes)
      found = p + bytes <= blocks[i].start + blocks[i].bytes ? blocks[i].device : -2;
  }
  pthread_mutex_unlock(&lock);
  return found;
}

int cudaMalloc(void **p, size_t n) {
  LEGAL("cudaMalloc");
  int error = take(p, n, 1);
  say("cudaMalloc %zu %p %d", n, error ? NULL : *p, error);
  return error;
}
int cudaMallocFromPoolAsync(void **p, size_t n, void *pool, void *stream) { return cudaMalloc(p, n); }
int cudaMallocHost(void **p, size_t n) {
  LEGAL("cudaMallocHost");
  int error = take(p, n, 0);
  say("cudaMallocHost %zu %p %d", n, error ? NULL : *p, error);
  return error;
}
int cudaHostAlloc(void **p, size_t n, unsigned flags) { return cudaMallocHost(p, n); }
int cudaFree(void *p) { LEGAL("cudaFree"); say("cudaFree 0 %p", p); return give(p, 1); }
int cudaFreeAsync(void *p, void *stream) { return cudaFree(p); }
int cudaFreeHost(void *p) { LEGAL("cudaFreeHost"); say("cudaFreeHost 0 %p", p); return give(p, 0); }
int cudaMemGetInfo(size_t *left, size_t *total) { *total = memory(); *left = *total - used; return SUCCESS; }
int cudaPointerGetAttributes(void *attributes, const void *p) {
  struct { int type, device; void *there, *here; } *found = attributes;
  int where = place(p, 1);
  found->type = where == 1 ? 2 : where == 0 ? 1 : 0;
  found->device = 0;
  found->there = where < 0 ? NULL : (void *)p;
  found->here = where == 1 ? NULL : (void *)p;
  return SUCCESS;
}

/* ---- copies ------------------------------------------------------------------------------------------------ */

/* Numbers between 0.12 and 0.5 as float32, between 1.5 and 1.75 as float16: never NaN, never all the same. */
static void plausible(void *to, size_t bytes) {
  unsigned char *out = to;
  for (size_t i = 0; i < bytes; i++) out[i] = i % 2 ? 0x3e : (unsigned char)(i / 4);
}

static int copied(const char *name, void *to, const void *from, size_t n, int kind, void *stream, int record) {
  int target = place(to, n), source = place(from, n);
  if (target == -2 || source == -2) return illegal("copy outside of an allocation", INVALID_VALUE);
  int found = (target == 1) ? (source == 1 ? ON_DEVICE : TO_DEVICE) : (source == 1 ? TO_HOST : 0);
  if (kind != BY_ADDRESS && kind != found) return illegal("copy in another direction", INVALID_DIRECTION);
  static const char *const words[] = {"H2H", "H2D", "D2H", "D2D"};
  int pageable = found == TO_DEVICE ? source == -1 : found == TO_HOST ? target == -1 : 0;
  say("%s %zu %p %s%s", name, n, stream, words[found], pageable ? " pageable" : "");
  if (record) { capture.graph->copies++; return SUCCESS; }
  if (found == TO_HOST) plausible(to, n);
  if (found == 0) memmove(to, from, n);
  return SUCCESS;
}

int cudaMemcpy(void *to, const void *from, size_t n, int kind) {
  LEGAL("cudaMemcpy");
  return copied("cudaMemcpy", to, from, n, kind, NULL, 0);
}
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) {
  int record = recorded("cudaMemcpyAsync", stream);
  return record < 0 ? -record : copied("cudaMemcpyAsync", to, from, n, kind, stream, record);
}
int cudaMemcpy2DAsync(void *to, size_t tp, const void *from, size_t fp, size_t w, size_t h, int kind, void *stream) {
  for (size_t i = 0; i < h; i++) {
    int error = cudaMemcpyAsync((char *)to + i * tp, (const char *)from + i * fp, w, kind, stream);
    if (error) return error;
  }
  return SUCCESS;
}
int cudaMemcpyFromSymbol(void *to, const void *symbol, size_t n, size_t offset, int kind) {
  LEGAL("cudaMemcpyFromSymbol");
  say("cudaMemcpyFromSymbol %zu", n);
  memset(to, 0, n);
  return SUCCESS;
}
int cudaMemset(void *p, int value, size_t n) {
  LEGAL("cudaMemset");
  say("cudaMemset %zu %p", n, p);
  return place(p, n) == 1 ? SUCCESS : illegal("set outside of an allocation", INVALID_VALUE);
}
int cudaMemsetAsync(void *p, int value, size_t n, void *stream) {
  int record = recorded("cudaMemsetAsync", stream);
  if (record < 0) return -record;
  say("cudaMemsetAsync %zu %p", n, stream);
  return place(p, n) == 1 ? SUCCESS : illegal("set outside of an allocation", INVALID_VALUE);
}

/* ---- streams and events ------------------------------------------------------------------------------------ */

int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
  *stream = calloc(1, sizeof(stream_t));
  ((stream_t *)*stream)->flags = flags;
  say("cudaStreamCreate 0 %p", *stream);
  return SUCCESS;
}
int cudaStreamCreate(void **stream) { return cudaStreamCreateWithFlags(stream, 0); }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int p) { return cudaStreamCreateWithFlags(stream, flags); }
int cudaStreamDestroy(void *stream) { say("cudaStreamDestroy 0 %p", stream); free(stream); return SUCCESS; }
int cudaStreamSynchronize(void *stream) {
  LEGAL("cudaStreamSynchronize");
  say("cudaStreamSynchronize 0 %p", stream);
  return SUCCESS;
}
int cudaStreamQuery(void *stream) { LEGAL("cudaStreamQuery"); return SUCCESS; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { say("cudaStreamWaitEvent 0 %p", stream); return SUCCESS; }
int cudaDeviceSynchronize(void) { LEGAL("cudaDeviceSynchronize"); say("cudaDeviceSynchronize"); return SUCCESS; }

int cudaEventCreateWithFlags(void **event, unsigned flags) {
  *event = calloc(1, sizeof(event_t));
  say("cudaEventCreate 0 %p", *event);
  return SUCCESS;
}
int cudaEventCreate(void **event) { return cudaEventCreateWithFlags(event, 0); }
int cudaEventDestroy(void *event) { say("cudaEventDestroy 0 %p", event); free(event); return SUCCESS; }
int cudaEventRecord(void *event, void *stream) {
  int record = recorded("cudaEventRecord", stream);
  if (record < 0) return -record;
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  ((event_t *)event)->recorded = 1;
  ((event_t *)event)->time = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
  say("cudaEventRecord 0 %p", event);
  return SUCCESS;
}
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return cudaEventRecord(event, stream); }
int cudaEventQuery(void *event) { LEGAL("cudaEventQuery"); return SUCCESS; }
int cudaEventSynchronize(void *event) { LEGAL("cudaEventSynchronize"); say("cudaEventSynchronize 0 %p", event); return SUCCESS; }
int cudaEventElapsedTime(float *milliseconds, event_t *first, event_t *second) {
  if (!first->recorded || !second->recorded) return failed(INVALID_HANDLE);
  *milliseconds = second->time - first->time;
  return SUCCESS;
}

/* ---- capture and graphs ------------------------------------------------------------------------------------ */

int cudaStreamBeginCapture(void *stream, int mode) {
  if (capture.status || !stream) return illegal("cudaStreamBeginCapture", NOT_IN_CAPTURE);
  say("cudaStreamBeginCapture %d %p", mode, stream);
  capture.mode = mode;
  capture.thread = pthread_self();
  capture.stream = stream;
  capture.graph = calloc(1, sizeof(graph_t));
  capture.status = ACTIVE;
  return SUCCESS;
}
int cudaStreamEndCapture(void *stream, void **graph) {
  if (!capture.status || stream != capture.stream) return illegal("cudaStreamEndCapture", NOT_IN_CAPTURE);
  int ok = capture.status == ACTIVE;
  capture.status = NONE;
  say("cudaStreamEndCapture %d %p", ok ? 0 : CAPTURE_INVALIDATED, stream);
  *graph = ok ? capture.graph : NULL;
  return ok ? SUCCESS : failed(CAPTURE_INVALIDATED);
}
int cudaStreamIsCapturing(void *stream, int *status) {
  *status = stream == capture.stream ? capture.status : NONE;
  return SUCCESS;
}
int cudaThreadExchangeStreamCaptureMode(int *mode) { return SUCCESS; }
int cudaGraphInstantiate(void **launchable, void *graph, unsigned long long flags) {
  *launchable = malloc(sizeof(graph_t));
  memcpy(*launchable, graph, sizeof(graph_t));
  say("cudaGraphInstantiate %d %p", ((graph_t *)graph)->kernels, *launchable);
  return SUCCESS;
}
int cudaGraphInstantiateWithFlags(void **launchable, void *graph, unsigned long long flags) {
  return cudaGraphInstantiate(launchable, graph, flags);
}
int cudaGraphDestroy(void *graph) { free(graph); return SUCCESS; }
int cudaGraphExecDestroy(void *launchable) { say("cudaGraphExecDestroy 0 %p", launchable); free(launchable); return SUCCESS; }
int cudaGraphLaunch(void *launchable, void *stream) {
  if (recorded("cudaGraphLaunch", stream)) return illegal("cudaGraphLaunch in a capture", NOT_IN_CAPTURE);
  say("cudaGraphLaunch %d %p", ((graph_t *)launchable)->kernels, launchable);
  return SUCCESS;
}

/* ---- kernels ----------------------------------------------------------------------------------------------- */

static int launched(void *stream) {
  int record = recorded("kernel", stream);
  if (record < 0) return -record;
  if (record) capture.graph->kernels++;
  say("kernel 0 %p", stream);
  return SUCCESS;
}
int cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, void *stream) { return launched(stream); }
int __cudaLaunchKernel(void *f, dim3 grid, dim3 block, void **args, size_t shared, void *stream) { return launched(stream); }
int cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, void *stream) { return launched(stream); }
int cudaLaunchKernelExC(const void *how, const void *f, void **args) {
  const struct { dim3 grid, block; size_t shared; void *stream; } *given = how;
  return launched(given->stream);
}
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
  int record = recorded("cudaLaunchHostFunc", stream);
  if (record < 0) return -record;
  say("cudaLaunchHostFunc 0 %p", stream);
  if (!record) function(data);
  return SUCCESS;
}
int __cudaGetKernel(void **kernel, const void *f) { *kernel = (void *)f; return SUCCESS; }
int cudaLibraryGetKernel(void **kernel, void *library, const char *name) { *kernel = (void *)1; return SUCCESS; }
int cudaLibraryLoadData(void **library) { *library = (void *)1; return SUCCESS; }
void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }

static _Thread_local struct { dim3 grid, block; size_t shared; void *stream; } pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  pushed.grid = grid; pushed.block = block; pushed.shared = shared; pushed.stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
  *grid = pushed.grid; *block = pushed.block; *shared = pushed.shared; *stream = pushed.stream;
  return SUCCESS;
}
int cudaFuncGetAttributes(void *attributes, const void *f) {
  struct { size_t shared, constant, local; int threads, registers, ptx, binary, cache, dynamic; } *found = attributes;
  memset(found, 0, sizeof *found);
  found->threads = 1024;
  found->registers = 32;
  found->dynamic = 49152;
  return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int size, size_t shared, unsigned flags) {
  *n = 4;
  return SUCCESS;
}

/* ---- the device -------------------------------------------------------------------------------------------- */

static void capability(int *major, int *minor) { sscanf(setting("CUDA_STANDIN_CAPABILITY", "8.9"), "%d.%d", major, minor); }

int cudaGetDeviceCount(int *n) { *n = 1; return SUCCESS; }
int cudaGetDevice(int *n) { *n = 0; return SUCCESS; }
int cudaSetDevice(int n) { return n ? failed(NO_DEVICE_OF_THAT_NUMBER) : SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cudaDeviceGetPCIBusId(char *text, int length, int device) { snprintf(text, length, "0000:01:00.0"); return SUCCESS; }
int cudaDeviceGetAttribute(int *value, int what, int device) {
  if (device) return failed(NO_DEVICE_OF_THAT_NUMBER);
  int major, minor;
  capability(&major, &minor);
  switch (what) {
    case 75: *value = major; break;
    case 76: *value = minor; break;
    case 1: *value = 1024; break;      /* threads of a block */
    case 39: *value = 1536; break;     /* of a multiprocessor */
    case 16: *value = 128; break;      /* multiprocessors */
    case 8: *value = 49152; break;     /* shared memory of a block */
    case 97: *value = 101376; break;   /* the same, opted in */
    case 81: *value = 102400; break;   /* of a multiprocessor */
    case 12: *value = 65536; break;    /* registers of a block */
    case 10: *value = 32; break;       /* threads of a warp */
    case 5: *value = 2147483647; break;
    case 38: *value = 50 << 20; break; /* second level cache */
    case 18: *value = 0; break;        /* no part of the host */
    default: *value = 1;
  }
  return SUCCESS;
}
int cudaGetDeviceProperties(void *properties, int device) {
  struct {
    char name[256], uuid[16], luid[8];
    unsigned mask;
    size_t memory, shared;
    int registers, warp;
    size_t pitch;
    int threads, block[3], grid[3];
    size_t constant;
    int major, minor;
    size_t texture, pitch_of_texture;
    int processors, integrated, mapped;
  } *found = properties;
  memset(properties, 0, 1008);
  snprintf(found->name, sizeof found->name, "stand-in");
  found->memory = memory();
  found->shared = 49152;
  found->registers = 65536;
  found->warp = 32;
  found->threads = found->block[0] = found->block[1] = 1024;
  found->block[2] = 64;
  found->grid[0] = 2147483647;
  found->grid[1] = found->grid[2] = 65535;
  found->constant = 65536;
  capability(&found->major, &found->minor);
  found->processors = 128;
  found->mapped = 1;
  return SUCCESS;
}
int cudaMemPoolCreate(void **pool) { *pool = (void *)1; return SUCCESS; }
int cudaDeviceGetDefaultMemPool(void **pool, int device) { *pool = (void *)1; return SUCCESS; }
int cudaMemPoolGetAttribute(void *pool, int what, void *value) { memset(value, 0, 8); return SUCCESS; }
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags, int *status) {
  *f = NULL;
  if (status) *status = 1; /* no such symbol */
  return SUCCESS;
}
int cudaGetLastError(void) { int error = last_error; last_error = 0; return error; }
int cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(int error) {
  static _Thread_local char text[32];
  snprintf(text, sizeof text, "cudaError%d", error);
  return text;
}
const char *cudaGetErrorString(int error) {
  return error == NOT_IN_CAPTURE ? "operation not permitted while a stream is capturing"
       : error == CAPTURE_INVALIDATED ? "the capture was invalidated by an earlier error"
       : error == OUT_OF_MEMORY ? "out of memory" : "an error of the stand-in";
}

/* Not CUDA's: a test writes into the log what it is about to do. */
void standin_note(const char *text) { say("# %s", text); }
