// torch's streams are in libtorch_cuda, which a build beside the CPU's torch can't link to: looked up where it is loaded.
#include "device.h"

#include <dlfcn.h>

namespace fastgan {

Stream current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "fastgan: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<Stream>(stream);
}

}  // namespace fastgan
