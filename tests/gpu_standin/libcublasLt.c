/* cuBLASLt finds one way for every product. */
#include <string.h>
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *wish, int room,
                                   void *results, int *found) {
  memset(results, 0, 96); /* an algorithm of 64 bytes, scratch, status, waves, 16 bytes to spare */
  *found = 1;
  return 0;
}
