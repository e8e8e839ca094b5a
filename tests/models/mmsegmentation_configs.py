"""Configs as mmsegmentation stores them in its checkpoints, for tests: the four kinds that CCNet was published with."""

from __future__ import annotations

from typing import Any

# Name of a kind -> the dataset's class, test_cfg, (long side, short side) of images.
KINDS: dict[str, tuple[str, str, tuple[int, int]]] = {
    "cityscapes 512x1024": ("CityscapesDataset", "dict(mode='whole')", (2048, 1024)),
    "cityscapes 769x769": (
        "CityscapesDataset",
        "dict(mode='slide', crop_size=(769, 769), stride=(513, 513))",
        (2049, 1025),
    ),
    "ade20k": ("ADE20KDataset", "dict(mode='whole')", (2048, 512)),
    "voc": ("PascalVOCDataset", "dict(mode='whole')", (2048, 512)),
}
# What each kind says, as keys of a file of ours.
WANTED: dict[str, tuple[str, dict[str, Any]]] = {
    "cityscapes 512x1024": ("cityscapes", {"mode": "whole", "short_side": 1024, "long_side": 2048}),
    "cityscapes 769x769": (
        "cityscapes",
        {"mode": "sliding", "window": [769, 769], "stride": [513, 513], "short_side": 1025, "long_side": 2049},
    ),
    "ade20k": ("ade20k", {"mode": "whole", "short_side": 512, "long_side": 2048}),
    "voc": ("voc", {"mode": "whole", "short_side": 512, "long_side": 2048}),
}


def of_0x(kind: str, test_cfg: str, scale: tuple[int, int], align_corners: bool = False) -> str:
    """Return a config of mmsegmentation 0.x."""
    return f"""norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    pretrained='open-mmlab://resnet50_v1c',
    backbone=dict(type='ResNetV1c', depth=50, dilations=(1, 1, 2, 4), norm_cfg=dict(type='SyncBN'), style='pytorch'),
    decode_head=dict(
        type='CCHead', in_channels=2048, channels=512, recurrence=2, align_corners={align_corners},
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(type='FCNHead', align_corners={align_corners}),
    train_cfg=dict(),
    test_cfg={test_cfg})
dataset_type = '{kind}'
data_root = 'data/'
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
crop_size = (512, 512)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', img_scale=(7, 8), ratio_range=(0.5, 2.0)),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75)
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale={scale},
        flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            dict(type='RandomFlip'),
            dict(type='Normalize', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img'])
        ])
]
data = dict(
    samples_per_gpu=2,
    workers_per_gpu=-1,
    train=dict(type='OtherDataset', data_root='data/', img_dir='a', pipeline=[dict(type='Resize', img_scale=(9, 9))]),
    val=dict(type='{kind}', pipeline=test_pipeline),
    test=dict(type='{kind}', data_root='data/', pipeline=test_pipeline))
optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0005)
"""


def of_1x(kind: str, test_cfg: str, scale: tuple[int, int], align_corners: bool = False) -> str:
    """Return a config of mmsegmentation 1.x."""
    pipeline = f"""[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale={scale}, type='Resize'),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ]"""
    return f"""crop_size = (
    512,
    512,
)
data_preprocessor = dict(bgr_to_rgb=True, pad_val=0, seg_pad_val=255, size=(512, 512), type='SegDataPreProcessor')
dataset_type = '{kind}'
model = dict(
    auxiliary_head=dict(align_corners={align_corners}, type='FCNHead'),
    backbone=dict(contract_dilation=True, depth=50, type='ResNetV1c'),
    decode_head=dict(align_corners={align_corners}, recurrence=2, type='CCHead'),
    pretrained='open-mmlab://resnet50_v1c',
    test_cfg={test_cfg},
    train_cfg=dict(),
    type='EncoderDecoder')
optim_wrapper = dict(clip_grad=None, optimizer=dict(lr=0.01, type='SGD'), type='OptimWrapper')
test_cfg = dict(type='TestLoop')
test_dataloader = dict(
    batch_size=1,
    dataset=dict(
        data_prefix=dict(img_path='images', seg_map_path='annotations'),
        pipeline={pipeline},
        type='{kind}'),
    sampler=dict(shuffle=False, type='DefaultSampler'))
test_evaluator = dict(iou_metrics=['mIoU'], type='IoUMetric')
test_pipeline = {pipeline}
train_dataloader = dict(dataset=dict(pipeline=[dict(scale=(7, 8), type='RandomResize')], type='OtherDataset'))
tta_model = dict(type='SegTTAModel')
tta_pipeline = [dict(type='TestTimeAug', transforms=[[dict(keep_ratio=True, scale_factor=0.5, type='Resize')]])]
"""
