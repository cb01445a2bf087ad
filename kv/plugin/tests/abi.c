/* A C program asks the library whether it fits. scripts/plugin-test links it with both forms of the library. */

#include <pumice_fs.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  pumice_abi needed = {sizeof(pumice_abi),   PUMICE_ABI_VERSION,  PUMICE_CAN_ASYNC,
                       sizeof(pumice_fault), sizeof(pumice_read), sizeof(pumice_stat),
                       0};
  char error[512] = "";
  if (pumice_abi_check(&needed, error, sizeof(error)) != 0) {
    fprintf(stderr, "abi: the library refuses its own header: %s\n", error);
    return 1;
  }
  needed.features = UINT64_C(1) << 63;
  if (pumice_abi_check(&needed, error, sizeof(error)) != 1 ||
      strstr(error, "lacks the abilities 0x8000000000000000") == NULL) {
    fprintf(stderr, "abi: an ability that the library lacks: %s\n", error);
    return 1;
  }
  const void *fs = NULL;
  const char *uri = "blobfs://malloc://64M";
  if (pumice_mount_uri(uri, strlen(uri), &fs) < 0) {
    fprintf(stderr, "abi: the mount failed\n");
    return 1;
  }
  uint64_t bytes = 0;
  if (pumice_free_bytes(fs, &bytes) < 0 || bytes == 0) {
    fprintf(stderr, "abi: there is no space\n");
    return 1;
  }
  pumice_fs_release(fs);
  return 0;
}
