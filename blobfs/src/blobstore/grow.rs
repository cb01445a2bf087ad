//! A store that grows with its device.

use super::Blobstore;
use super::error::Error;
use super::format::{MASK_HEADER_LEN, PAGE_SIZE_U64, mask_pages};

impl Blobstore {
    /// Takes what the device has beyond the recorded size, as far as the cluster mask has room for it
    /// (a store is made with room for as many clusters as it has metadata pages). Gives the number of new
    /// clusters, 0 if there is nothing to gain. Durable on return. Blocks.
    ///
    /// # Errors
    /// The device is larger but the cluster mask cannot grow, I/O errors.
    pub fn grow(&self) -> Result<u64, Error> {
        let mut state = self.inner.state.lock();
        let mut change = state.begin()?;
        let info = self.inner.dev.info();
        let old = state.geo.total_clusters;
        let wanted = (info.len_bytes() / state.geo.cluster_size).min(u64::from(u32::MAX));
        let wanted = u32::try_from(wanted).expect("bounded above");
        if wanted <= old {
            return Ok(0);
        }
        let sb = &state.sb;
        let start = sb.used_cluster_mask_start.get();
        let others = [
            sb.used_page_mask_start.get(),
            sb.used_blobid_mask_start.get(),
            sb.md_start.get(),
        ];
        let next = others
            .into_iter()
            .filter(|other| *other > start)
            .min()
            .unwrap_or(start);
        let reserved = u64::from(next - start);
        let room = (reserved * PAGE_SIZE_U64).saturating_sub(MASK_HEADER_LEN as u64) * 8;
        let total = wanted.min(u32::try_from(room).unwrap_or(u32::MAX));
        if total <= old {
            return Err(Error::Geometry {
                device: info.name.clone(),
                reason: format!(
                    "the device has {wanted} clusters, but the cluster mask has no room for more than {old}; \
                     make a new store with more metadata pages (md_pages)"
                ),
            });
        }
        let size = if total == wanted {
            info.len_bytes()
        } else {
            u64::from(total) * state.geo.cluster_size
        };
        let before = state.sb.clone();
        state.sb.size = size.into();
        state.sb.used_cluster_mask_len = u32::try_from(mask_pages(total.into()))
            .expect("at most 2^17 pages")
            .into();
        change.super_block = true;
        if let Err(error) = state.commit(change) {
            state.sb = before;
            return Err(error);
        }
        state.geo.total_clusters = total;
        state.clusters.grow(total);
        Ok(u64::from(total - old))
    }
}
