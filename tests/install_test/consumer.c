#include <heed/heed.h>

#include <stdio.h>
#include <string.h>

static heed_tensor row(float* data) { /* [1, 1, 1, 2] */
  heed_tensor tensor;
  memset(&tensor, 0, sizeof tensor);
  tensor.data = data;
  tensor.dtype = HEED_DTYPE_F32;
  tensor.ndim = 4;
  tensor.shape[0] = tensor.shape[1] = tensor.shape[2] = 1, tensor.shape[3] = 2;
  tensor.stride[0] = tensor.stride[1] = tensor.stride[2] = 2, tensor.stride[3] = 1;
  return tensor;
}

int main(void) {
  float q[2] = {1, 2}, k[2] = {3, 4}, v[2] = {5, 6}, out[2] = {0, 0};
  heed_attention_args args;
  heed_attention_args_init(&args);
  args.q = row(q), args.k = row(k), args.v = row(v), args.out = row(out);
  if (heed_attention(&args, NULL) != HEED_OK) {
    printf("%s\n", heed_last_error());
    return 1;
  }
  printf("heed %s from C: %g %g\n", heed_version(), (double)out[0], (double)out[1]);
  return out[0] == 5.0f && out[1] == 6.0f ? 0 : 1; /* one key: its value */
}
