"""The penalty functions that GAN code copies most, by their own names, argument orders, random draws and return types.

Change an import and a trainer runs on fastgan's penalties. One module per project; what is unambiguous is here too:

===========================  ==================================================  ==========================================
module                       functions                                           notes
===========================  ==================================================  ==========================================
``caogang``  (wgan-gp)       ``calc_gradient_penalty``                           here
``ctgan``                    ``calc_gradient_penalty``                           packed; also as a discriminator's method
``cyclegan``                 ``cal_gradient_penalty``                            here; returns (penalty, gradients)
``gan_stability``            ``compute_grad2``                                   here; returns (B,)
``gan_zoo``                  ``WGANGPGradientPenalty``,                          here; run backward themselves, return floats
                             ``logisticGradientPenalty``, ``miniBatchStdDev``
``gigagan``                  ``gradient_penalty``                                outputs of several scales
``lucidrains``               ``gradient_penalty``                                here
``mmgen``                    ``gradient_penalty_loss``,                          here; ``norm_mode``
                             ``r1_gradient_penalty_loss``
``pytorch_gan``              ``compute_gradient_penalty``                        here; with fakes WGAN-GP's, without DRAGAN's
``r3gan``                    ``ZeroCenteredGradientPenalty``                     here; returns (B,)
``rosinality``               ``d_r1_loss``                                       here
``stargan``                  ``r1_reg``                                          here
``studiogan``                ``cal_grad_penalty``, ``cal_dra_penalty``,          here
                             ``cal_maxgrad_penalty``, ``cal_r1_reg``,
                             ``stylegan_cal_r1_reg``, ``cal_deriv``
``torchgan``                 ``wasserstein_gradient_penalty``,                   whole-batch norm
                             ``dragan_gradient_penalty``
===========================  ==================================================  ==========================================

Numbers are the project's own. Where these differ from the paper that the function names, because a norm is taken over pixels
or over the whole batch instead of over a sample, the default does what the paper says and warns once; ``strict_peer=True``
reproduces the project. Differences that no number shows: fakes are detached (nothing flows into a generator), the caller's
tensors are not marked as requiring gradients, and a norm has the derivative 0 at 0.

Functions that are given the critic return penalties that can be sent backward once, as :mod:`fastgan.penalties` describes.
"""

from fastgan.compat import caogang as caogang
from fastgan.compat import ctgan as ctgan
from fastgan.compat import cyclegan as cyclegan
from fastgan.compat import gan_stability as gan_stability
from fastgan.compat import gan_zoo as gan_zoo
from fastgan.compat import gigagan as gigagan
from fastgan.compat import lucidrains as lucidrains
from fastgan.compat import mmgen as mmgen
from fastgan.compat import pytorch_gan as pytorch_gan
from fastgan.compat import r3gan as r3gan
from fastgan.compat import rosinality as rosinality
from fastgan.compat import stargan as stargan
from fastgan.compat import studiogan as studiogan
from fastgan.compat import torchgan as torchgan
from fastgan.compat.caogang import calc_gradient_penalty as calc_gradient_penalty
from fastgan.compat.cyclegan import cal_gradient_penalty as cal_gradient_penalty
from fastgan.compat.gan_stability import compute_grad2 as compute_grad2
from fastgan.compat.gan_zoo import WGANGPGradientPenalty as WGANGPGradientPenalty
from fastgan.compat.gan_zoo import logisticGradientPenalty as logisticGradientPenalty
from fastgan.compat.lucidrains import gradient_penalty as gradient_penalty
from fastgan.compat.mmgen import gradient_penalty_loss as gradient_penalty_loss
from fastgan.compat.mmgen import r1_gradient_penalty_loss as r1_gradient_penalty_loss
from fastgan.compat.pytorch_gan import compute_gradient_penalty as compute_gradient_penalty
from fastgan.compat.r3gan import ZeroCenteredGradientPenalty as ZeroCenteredGradientPenalty
from fastgan.compat.rosinality import d_r1_loss as d_r1_loss
from fastgan.compat.stargan import r1_reg as r1_reg
from fastgan.compat.studiogan import cal_deriv as cal_deriv
from fastgan.compat.studiogan import cal_dra_penalty as cal_dra_penalty
from fastgan.compat.studiogan import cal_grad_penalty as cal_grad_penalty
from fastgan.compat.studiogan import cal_maxgrad_penalty as cal_maxgrad_penalty
from fastgan.compat.studiogan import cal_r1_reg as cal_r1_reg
from fastgan.compat.studiogan import stylegan_cal_r1_reg as stylegan_cal_r1_reg
