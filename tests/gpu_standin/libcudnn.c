/* What of cuDNN returns more than success: descriptors whose every question has one answer. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Types of an attribute. For a descriptor the caller brings the object that is filled; of notes, by which engines
   with TF32 are passed over, there are none. */
enum { NUMERICAL_NOTE = 11, DESCRIPTOR = 15, BEHAVIOUR_NOTE = 19 };

size_t cudnnGetVersion(void) { return 91900; }
size_t cudnnGetCudartVersion(void) { return 13000; }
const char *cudnnGetErrorString(int status) { return status ? "an error of the stand-in" : "success"; }
void cudnnGetLastErrorString(char *text, size_t length) { if (length) *text = 0; }
int cudnnBackendCreateDescriptor(int kind, void **made) { *made = calloc(1, 4096); return 0; }
int cudnnBackendDestroyDescriptor(void *made) { free(made); return 0; }
int cudnnBackendGetAttribute(void *of, int name, int type, int64_t room, int64_t *found, void *values) {
  int none = type == NUMERICAL_NOTE || type == BEHAVIOUR_NOTE;
  if (found) *found = !none;
  if (values && room > 0 && !none && type != DESCRIPTOR) memset(values, 0, 8);
  return 0;
}
int cudnnGetConvolutionForwardWorkspaceSize(void *h, void *x, void *w, void *c, void *y, int how, size_t *n) { *n = 1024; return 0; }
int cudnnGetReductionWorkspaceSize(void *h, void *r, void *a, void *c, size_t *n) { *n = 1024; return 0; }
int cudnnGetReductionIndicesSize(void *h, void *r, void *a, void *c, size_t *n) { *n = 1024; return 0; }
