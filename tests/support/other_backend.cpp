// A device of torch's own making: its type is PrivateUse1, its memory is the host's.
//
// Memory, copies and views are written here; every other operation is computed by the CPU's kernel.
// Unlike the CPU, the device refuses tensors of another place beside its own, and float64 where
// KLORA_TEST_NO_FLOAT64 is set in the environment.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>

namespace {

constexpr auto kOther = c10::DeviceType::PrivateUse1;

void forget(void* data) {
  std::free(data);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    void* data = nbytes == 0 ? nullptr : std::malloc(nbytes);
    return {data, data, &forget, c10::Device(kOther, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &forget;
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    default_copy_data(to, from, count);
  }
};

Memory memory;
REGISTER_ALLOCATOR(kOther, &memory);

using Guard = c10::impl::NoOpDeviceGuardImpl<kOther>;
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
};

void require_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      dtype != c10::kDouble || std::getenv("KLORA_TEST_NO_FLOAT64") == nullptr,
      "this device has no float64");
}

at::Tensor empty(
    c10::IntArrayRef size,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>,
    std::optional<c10::MemoryFormat> format) {
  const auto type = c10::dtype_or_default(dtype);
  require_dtype(type);
  const auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, type, format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size,
    c10::IntArrayRef stride,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>) {
  const auto type = c10::dtype_or_default(dtype);
  require_dtype(type);
  const auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, type);
}

// The host's view of a tensor's memory, which the CPU's kernels read and write.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().type() != kOther) {
    return tensor;
  }
  return at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(c10::kCPU));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

const at::Tensor& resize(
    const at::Tensor& tensor, c10::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto* described = tensor.unsafeGetTensorImpl();
  described->set_sizes_contiguous(size);
  const auto offset = described->storage_offset();
  const size_t needed = (offset + described->numel()) * described->itemsize();
  auto* storage = described->unsafe_storage().unsafeGetStorageImpl();
  if (needed > storage->nbytes()) {
    auto grown = memory.allocate(needed);
    if (storage->nbytes() > 0) {
      std::memcpy(grown.get(), storage->data(), storage->nbytes());
    }
    storage->set_data_ptr(std::move(grown));
    storage->set_nbytes(needed);
  }
  return tensor;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor& set_storage(
    at::Tensor& tensor,
    c10::Storage storage,
    int64_t offset,
    c10::IntArrayRef size,
    c10::IntArrayRef stride) {
  return at::cpu::set_(tensor, std::move(storage), offset, size, stride);
}

at::Scalar local_scalar_dense(const at::Tensor& tensor) {
  return on_host(tensor).item();
}

void require_one_place(const std::string& operation, const at::Tensor& tensor, bool& host) {
  host = host || (tensor.defined() && tensor.device().is_cpu() && tensor.dim() > 0);
  TORCH_CHECK(
      !host,
      "Expected all tensors to be on the same device, but found at least two devices, ",
      c10::Device(kOther, 0),
      " and cpu! (",
      operation,
      ")");
}

at::Tensor convolution(
    const at::Tensor& input,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    c10::IntArrayRef stride,
    c10::IntArrayRef padding,
    c10::IntArrayRef dilation,
    bool transposed,
    c10::IntArrayRef output_padding,
    int64_t groups) {
  bool host = false;
  require_one_place("convolution", input, host);
  require_one_place("convolution", weight, host);
  auto own = bias.has_value() && bias->defined() ? std::optional(on_host(*bias)) : std::nullopt;
  return at::convolution(
             on_host(input), on_host(weight), own,
             stride, padding, dilation, transposed, output_padding, groups)
      .to(input.device());
}

long computed = 0;

void by_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  bool host = false;
  const auto& name = operation.schema().name();
  for (const auto& value : torch::jit::last(stack, operation.schema().arguments().size())) {
    if (value.isTensor()) {
      require_one_place(name, value.toTensor(), host);
    } else if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) {
        require_one_place(name, tensor, host);
      }
    }
  }
  ++computed;
  at::native::cpu_fallback(operation, stack, /*error_on_views=*/true);
}

} // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar_dense);
  library.impl("_reshape_alias", &at::cpu::_reshape_alias);
  library.impl("as_strided", &at::cpu::as_strided);
  library.impl("resize_", &resize);
  library.impl("convolution_overrideable", &convolution);
  library.impl("unfold", &at::cpu::unfold);
  library.impl("view", &at::cpu::view);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}

// Called once, by the process that plays with the device.
extern "C" void klora_test_other_device() {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
}

// How many operations the CPU's kernels have computed for the device.
extern "C" long klora_test_computed() {
  return computed;
}
