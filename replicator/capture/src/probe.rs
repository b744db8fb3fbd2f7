//! Can this host capture at all? Asked before a guest is touched; `havm check` asks too.

use crate::error::CaptureError;
use crate::pagemap;

/// Checks processor and kernel: PAGEMAP_SCAN here; asynchronous write protection shows with the
/// first userfaultfd (it came with the same kernel, 6.7).
///
/// # Errors
/// [`CaptureError::Kernel`] or [`CaptureError::Architecture`], which say what is missing.
pub fn probe() -> Result<(), CaptureError> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(CaptureError::Architecture {
            arch: std::env::consts::ARCH,
        });
    }
    match pagemap::supported() {
        Ok(true) => Ok(()),
        Ok(false) => Err(CaptureError::Kernel {
            missing: "ioctl PAGEMAP_SCAN",
        }),
        Err(source) => Err(CaptureError::System {
            what: "scan our own page map",
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_machine_can_capture() {
        super::probe().expect("the tests need kernel 6.7 or later");
    }
}
