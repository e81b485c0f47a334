/* What of cuBLAS returns more than success. */
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
const char *cublasGetStatusName(int status) { return "CUBLAS_STATUS"; }
const char *cublasGetStatusString(int status) { return status ? "an error of the stand-in" : "success"; }
